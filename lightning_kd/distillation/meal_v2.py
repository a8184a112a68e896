"""MEAL V2: fine-tune a trained student on the mean probabilities of several teachers, without labels.

Zhiqiang Shen, Marios Savvides. MEAL V2: Boosting Vanilla ResNet-50 to 80%+ Top-1 Accuracy on ImageNet without Tricks.
2020, arXiv 2009.08453.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.batch import Batch
from lightning_kd.core.losses import at_least_float32, check_logits, check_shapes, soft_cross_entropy
from lightning_kd.core.mixing import cut_mix, draw_box
from lightning_kd.distillation.label_free_distillation import LabelFreeDistillation

__all__ = ["MEALV2", "Discriminator", "discriminator_loss", "mean_probabilities"]


def mean_probabilities(logits: Sequence[Tensor]) -> Tensor:
    """The mean of the teachers' softmax outputs (not the softmax of their mean logits).

    Args:
        logits: logits of one or more teachers, each ``[B, C]``; half precision is computed in float32, float64 stays.

    Returns:
        ``[B, C]``, sum 1 over the classes.

    Raises:
        ValueError: if the list is empty, or a shape is wrong.

    Source: arXiv 2009.08453, the soft labels of an ensemble.
    """
    if not len(logits):
        raise ValueError("logits must be those of one teacher or more, got none: give a list of tensors [B, C]")
    check_shapes(**{f"logits[{k}]": (one, "BC") for k, one in enumerate(logits)})
    return torch.stack([one.softmax(1) for one in at_least_float32(*logits)]).mean(0)


class Discriminator(nn.Module):
    """A network that decides whether logits are the student's or the teachers': three linear layers, each with ReLU.

    The official code uses 1 x 1 convolutions, which are equivalent.

    Args:
        num_classes: number of logits ``C``.
        hidden: widths of the two hidden layers, or that of the first; the second is then an eighth of it. Default:
            ``C / 8`` and ``C / 64``, as in the official code, at least 1.
        final_relu: apply ReLU to the two outputs too, as in the official code; they cannot be negative then.

    Raises:
        ValueError: if a width is not a whole number above 0, or there are not two.
    """

    def __init__(self, num_classes: int, hidden: int | Sequence[int] | None = None, final_relu: bool = True) -> None:
        super().__init__()
        check_numbers(least=1, whole=True, num_classes=num_classes)
        first = hidden if isinstance(hidden, int) else max(1, num_classes // 8)
        widths = list(hidden) if isinstance(hidden, Sequence) else [first, max(1, first // 8)]
        for width in widths:
            check_numbers(least=1, whole=True, hidden=width)
        if len(widths) != 2:
            raise ValueError(f"hidden must be the widths of two layers, got {widths}: give two, or that of the first")
        self.fc1 = nn.Linear(num_classes, widths[0])
        self.fc2 = nn.Linear(widths[0], widths[1])
        self.fc3 = nn.Linear(widths[1], 2)
        self.final_relu = final_relu

    def forward(self, logits: Tensor) -> Tensor:
        """From logits ``[B, C]`` to ``[B, 2]``: the logits of "from the student" and of "from the teachers"."""
        out = self.fc3(F.relu(self.fc2(F.relu(self.fc1(logits)))))
        return F.relu(out) if self.final_relu else out


def discriminator_loss(discriminator: nn.Module, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Loss of the discriminator: binary cross-entropy, mean over all ``2B x 2`` outputs.

    The target is (1, 0) for the student's logits and (0, 1) for the teachers'. No gradient is reversed: if the student
    is trained with this loss too, it becomes easier to tell from the teachers.

    Args:
        discriminator: module from logits ``[2B, C]`` to ``[2B, 2]``; it runs in its own precision, without autocast.
        student_logits: ``[B, C]``.
        teacher_logits: ``[B, C]``, for several teachers the mean of their logits; gets no gradient.

    Returns:
        Scalar.

    Raises:
        ValueError: if the logits differ in shape.

    Source: arXiv 2009.08453, as in the official code.
    """
    check_logits(student_logits, teacher_logits)
    with torch.autocast(student_logits.device.type, enabled=False):
        both = torch.cat(at_least_float32(student_logits, teacher_logits.detach()))
        output = discriminator(both)
        is_student = (torch.arange(len(both), device=both.device) < len(student_logits))[:, None]
        target = torch.cat([is_student, ~is_student], 1).to(output.dtype)
        return F.binary_cross_entropy_with_logits(output, target)


class MEALV2(LabelFreeDistillation):
    """MEAL V2 (Shen and Savvides, 2020, arXiv 2009.08453): fine-tune a trained student on the mean of several teachers.

    The targets are the mean of the teachers' probabilities (``mean_probabilities``), and the loss is
    ``soft_cross_entropy``; labels are not used. The student should start from ``student_weights``, its own earlier
    training, as improving a trained network is the purpose of the method; without them a fit warns. Weight decay should
    be 0, which is the default.

    The paper adds a discriminator that tells the student's outputs from the teachers'. In the official code its
    gradient is not reversed, so the student also minimises ``discriminator_loss`` and becomes easier to recognise.
    Hence there are three modes of ``discriminator``; the default is to have none.

    Several processes: each has a copy of the teachers; losses are means over the process's batch, and mixing is drawn
    per process.

    Args:
        student: see ``Distillation``.
        teacher: a list of networks (names or modules), or one; see ``Distillation``, also for a ``teacher_mean``,
            ``teacher_std`` and ``teacher_size`` of each.
        num_classes: see ``Task``.
        input_shape: see ``Task``.
        discriminator: ``"none"``; ``"cooperative"``: add ``discriminator_loss`` as in the official code, to compare
            with published results; ``"adversarial"``: reverse its gradient for the student.
        discriminator_hidden: widths of the discriminator's hidden layers, see ``Discriminator``.
        final_relu: see ``Discriminator``.
        cutmix: share of the batches that are mixed by CutMix, for teachers and student alike, in [0, 1]. ``train/acc``
            then refers to the image with most pixels.
        cutmix_alpha: both parameters of the Beta distribution of the share of pixels that is kept, above 0.
        kwargs: the further arguments of ``LabelFreeDistillation``. The default ``optimizer`` is SGD with learning rate
            0.01, momentum 0.9 and no weight decay.

    Raises:
        ValueError: if an argument is out of range, or ``cutmix`` is set for samples that are no images.
    """

    def __init__(
        self,
        student: str | nn.Module,
        teacher: str | nn.Module | list[str | nn.Module],
        num_classes: int,
        *,
        input_shape: Sequence[int] = (3, 32, 32),
        discriminator: Literal["none", "cooperative", "adversarial"] = "none",
        discriminator_hidden: int | list[int] | None = None,
        final_relu: bool = True,
        cutmix: float = 0.0,
        cutmix_alpha: float = 1.0,
        **kwargs: Any,
    ) -> None:
        # a store has neither the logits of each teacher nor those of mixed images
        self.looks_into_teacher = discriminator != "none" or bool(cutmix)
        super().__init__(student, teacher, num_classes, input_shape=input_shape, **kwargs)
        if discriminator not in ("none", "cooperative", "adversarial"):
            raise ValueError(
                f"discriminator must be 'none', 'cooperative' or 'adversarial', got {discriminator!r}: give one of them"
            )
        check_numbers(least=0, most=1, remedy="give the share of batches", cutmix=cutmix)
        check_numbers(above=0, cutmix_alpha=cutmix_alpha)
        if cutmix and len(self.input_shape) != 3:
            raise ValueError(f"cutmix={cutmix} needs images, got input_shape {self.input_shape}: leave it out")
        self.mode = discriminator
        self.cutmix, self.cutmix_alpha = cutmix, cutmix_alpha
        self.discriminator: Discriminator | None = None
        if discriminator != "none":
            self.discriminator = Discriminator(num_classes, discriminator_hidden, final_relu)
        self._starts_from_nothing = isinstance(student, str) and not self.has_given_weights

    def default_optimizer(self, parameters: list[Any]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=0.0)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self._starts_from_nothing and self.trainer.ckpt_path is None:
            rank_zero_warn(
                "MEAL V2 tunes a student that is trained already, and student_weights is None: give the file of a "
                "training of its own, such as runs/STUDENT/network.pt"
            )

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self._draws = self.generator("cutmix")

    def mixed(self, batch: Batch) -> Batch:
        """The batch, mixed by CutMix or unchanged; targets are those of the images with most pixels."""
        if not self.cutmix or self._draws.random() >= self.cutmix:
            return batch
        height, width = batch.image.shape[-2:]
        box = draw_box(self._draws, self.cutmix_alpha, height, width)
        partner = torch.from_numpy(self._draws.permutation(len(batch.image))).to(batch.image.device)
        target = batch.target[partner] if 2 * box.area > height * width else batch.target
        return batch._replace(image=cut_mix(batch.image, partner, box), target=target)

    def distillation_loss(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
        """The loss on soft targets; ``softmax(teacher_logits)`` must be the mean of the teachers' probabilities."""
        return soft_cross_entropy(student_logits, teacher_logits.softmax(1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch = self.mixed(self.training_batch(batch))
        if self.discriminator is None:
            logits, answer = at_least_float32(self(batch.image), self.teacher_logits_for(batch))
            terms = {"similarity": self.distillation_loss(logits, answer, batch.target)}
        else:
            logits, *answers = at_least_float32(self(batch.image), *(teacher(batch.image) for teacher in self.teachers))
            # the same values with reversed gradient
            seen = 2 * logits.detach() - logits if self.mode == "adversarial" else logits
            terms = {
                "similarity": soft_cross_entropy(logits, mean_probabilities(answers)),
                "discriminator": discriminator_loss(self.discriminator, seen, torch.stack(answers).mean(0)),
            }
        terms = {name: self.kd_weight * term for name, term in terms.items()}
        return self.step_loss(terms, logits, batch.target, counted=batch.target >= 0)
