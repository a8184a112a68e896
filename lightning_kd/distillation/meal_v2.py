"""MEAL V2: a trained student is tuned on the mean answer of several teachers, without labels.

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
    """The mean of the softmax of each teacher's logits, which is not the softmax of their mean.

    Args:
        logits: of one or more teachers, each ``[B, C]``; half precision is computed in float32, float64 stays.

    Returns:
        ``[B, C]``; rows sum to 1.

    Raises:
        ValueError: for none, and for other shapes.

    Source: arXiv 2009.08453, the soft labels of an ensemble.
    """
    if not len(logits):
        raise ValueError("logits must be those of one teacher or more, got none: give a list of tensors [B, C]")
    check_shapes(**{f"logits[{k}]": (one, "BC") for k, one in enumerate(logits)})
    return torch.stack([one.softmax(1) for one in at_least_float32(*logits)]).mean(0)


class Discriminator(nn.Module):
    """Tells a student's logits from a teacher's: three linear layers with ReLU, also after the last.

    The official code has 1 x 1 convolutions, which are the same.

    Args:
        num_classes: of the logits, ``C``.
        hidden: the widths of the two hidden layers, or that of the first, of which the second has an eighth. Default:
            ``C / 8`` and ``C / 64`` as in the official code, at least 1.
        final_relu: keep the ReLU of the two outputs, which then cannot be negative, as in the official code.

    Raises:
        ValueError: for a width that is none.
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
        """``[B, 2]``, logits of coming from the student and of coming from the teachers, of ``[B, C]``."""
        out = self.fc3(F.relu(self.fc2(F.relu(self.fc1(logits)))))
        return F.relu(out) if self.final_relu else out


def discriminator_loss(discriminator: nn.Module, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """How badly ``discriminator`` tells who said what: binary cross-entropy, the mean over all ``2B x 2`` outputs.

    The target of student rows is (1, 0), of teacher rows (0, 1). Nothing is reversed here: whoever descends it, the
    student included, makes the two easier to tell apart.

    Args:
        discriminator: from logits ``[2B, C]`` to ``[2B, 2]``; runs in its own precision, without autocast.
        student_logits: ``[B, C]``.
        teacher_logits: ``[B, C]``, of several teachers the mean of their logits; gets no gradient.

    Returns:
        Scalar.

    Raises:
        ValueError: for logits of two shapes.

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
    """MEAL V2 (Shen and Savvides, 2020, arXiv 2009.08453): a trained student learns the mean answer of teachers.

    The loss is ``soft_cross_entropy`` with ``mean_probabilities`` of the teachers; no label is learnt. The student must
    start from ``student_weights``, a training of its own: that is the point of the method, and without them a fit
    warns. Weight decay should be 0, as it is by default.

    A discriminator works against those that it tells apart; in the official code no sign is reversed, so that the
    student, too, descends ``discriminator_loss``. Hence three modes, of which the plain one is the default.

    Several processes: each has a copy of the teachers; losses are means over the process's batch, for which mixing is
    drawn by itself.

    Args:
        student: see ``Distillation``.
        teacher: a list of network names or modules, or one of them; see ``Distillation``, also for their own
            ``teacher_mean``, ``teacher_std`` and ``teacher_size``.
        num_classes: see ``Task``.
        input_shape: see ``Task``.
        discriminator: ``"none"``; ``"cooperative"`` adds ``discriminator_loss`` as the official code does, to compare
            with the published numbers; ``"adversarial"`` reverses its gradient on the student's side.
        discriminator_hidden: widths of its hidden layers, see ``Discriminator``.
        final_relu: see ``Discriminator``.
        cutmix: the share of batches whose images are mixed by CutMix before teachers and student see them, in [0, 1].
            ``train/acc`` is then of the image that has most of the pixels.
        cutmix_alpha: both parameters of the Beta distribution of the share that is kept, above 0.
        kwargs: the further arguments of ``LabelFreeDistillation``. Without ``optimizer`` it is SGD, learning rate 0.01,
            momentum 0.9, without weight decay.

    Raises:
        ValueError: for ``cutmix`` with samples that are no images.
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
        # each teacher's own logits, or those of images that are mixed here, are in no store
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
        """The batch with mixed images, or as it is; the target is that of the image with most of the pixels."""
        if not self.cutmix or self._draws.random() >= self.cutmix:
            return batch
        height, width = batch.image.shape[-2:]
        box = draw_box(self._draws, self.cutmix_alpha, height, width)
        partner = torch.from_numpy(self._draws.permutation(len(batch.image))).to(batch.image.device)
        target = batch.target[partner] if 2 * box.area > height * width else batch.target
        return batch._replace(image=cut_mix(batch.image, partner, box), target=target)

    def distillation_loss(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
        """The similarity loss alone, of logits whose softmax is the mean answer."""
        return soft_cross_entropy(student_logits, teacher_logits.softmax(1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch = self.mixed(self.training_batch(batch))
        if self.discriminator is None:
            logits, answer = at_least_float32(self(batch.image), self.teacher_logits_for(batch))
            terms = {"similarity": self.distillation_loss(logits, answer, batch.target)}
        else:
            logits, *answers = at_least_float32(self(batch.image), *(teacher(batch.image) for teacher in self.teachers))
            # of the same value, and with the gradient reversed
            seen = 2 * logits.detach() - logits if self.mode == "adversarial" else logits
            terms = {
                "similarity": soft_cross_entropy(logits, mean_probabilities(answers)),
                "discriminator": discriminator_loss(self.discriminator, seen, torch.stack(answers).mean(0)),
            }
        terms = {name: self.kd_weight * term for name, term in terms.items()}
        return self.step_loss(terms, logits, batch.target, counted=batch.target >= 0)
