"""Distillation for semantic segmentation: by pixel, by channel, or none as a baseline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.batch import as_batch
from lightning_kd.core.feature_hooks import Tap
from lightning_kd.core.losses import at_least_float32, check_positive, check_shapes
from lightning_kd.core.outputs import auxiliary_logits, logits_of, resized
from lightning_kd.core.problems import Segmentation
from lightning_kd.distillation.distillation_task import Distillation
from lightning_kd.distillation.kd import kd_loss

__all__ = ["Heads", "SegmentationDistillation", "cwd_loss"]

# default (temperature, weight) of each loss, from its paper
_USUAL = {"kd": (1.0, 1.0), "cwd": (4.0, 3.0), "none": (1.0, 0.0)}


def pixel_kd_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``kd_loss`` of each position of two logit maps: ``temperature^2 * KL``, sum over classes, mean over positions.

    Args:
        student: ``[B, C, h, w]``; half precision is computed in float32, float64 stays.
        teacher: ``[B, C, h, w]``; gets no gradient.
        temperature: above 0.

    Returns:
        Scalar.

    Raises:
        ValueError: if the shapes differ, or ``temperature`` is not above 0.

    Source: arXiv 1503.02531, and pixel-wise distillation of arXiv 1903.04197.
    """
    check_shapes(student=(student, "BCHW"), teacher=(teacher, "BCHW"))
    own, taught = (logits.permute(0, 2, 3, 1).flatten(0, 2) for logits in (student, teacher))
    return kd_loss(own, taught, temperature)


def cwd_loss(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """Channel-wise distillation: ``temperature^2 * KL`` between distributions of each class over all positions.

    The softmax of each channel (class) is over the positions, so the student learns where each class is. Sum over
    positions, mean over channels and images.

    Args:
        student: ``[B, C, h, w]``; half precision is computed in float32, float64 stays.
        teacher: ``[B, C, h, w]``; gets no gradient.
        temperature: above 0.

    Returns:
        Scalar.

    Raises:
        ValueError: if the shapes differ, or ``temperature`` is not above 0.

    Source: Shu et al., Channel-wise Knowledge Distillation for Dense Prediction, ICCV 2021, arXiv 2011.13256.
    """
    check_shapes(student=(student, "BCHW"), teacher=(teacher, "BCHW"))
    check_positive(temperature=temperature)
    return kd_loss(student.flatten(2).flatten(0, 1), teacher.flatten(2).flatten(0, 1), temperature)


class Heads(NamedTuple):
    """The outputs of a segmentation network for a batch.

    Attributes:
        main: float32 logits ``[B, C, h, w]`` of the main head, to compare with labels.
        auxiliary: float32 logits of the auxiliary head; ``None`` if there is none.
        coarse: main and auxiliary logits to compare with the other network: before they are enlarged, if a torchvision
            network enlarges them itself, else equal to ``main`` and ``auxiliary``.
    """

    main: Tensor
    auxiliary: Tensor | None
    coarse: tuple[Tensor, Tensor | None]


class SegmentationDistillation(Distillation):
    """Distillation for semantic segmentation: cross-entropy for both heads, and distillation of the main head.

    The loss is ``task_loss + kd_weight * distillation_loss``. The class serves as baseline, and as base of methods that
    override ``task_loss``. Logits smaller than the image are enlarged with aligned corners, in training and evaluation;
    torchvision networks and ``fcn_tiny`` enlarge them themselves.

    Several processes: each has a copy of the teacher; losses are means over the process's pixels.

    Args:
        student: name of a network or ``nn.Module``. It returns logits ``[B, C, h, w]`` as a tensor or, with an
            auxiliary head, a dict with ``out`` and ``aux``, or a tuple or list of two.
        teacher: name of a network or ``nn.Module``, likewise.
        num_classes: see ``Task``.
        loss: ``"kd"`` (``pixel_kd_loss``), ``"cwd"`` (``cwd_loss``), or ``"none"`` to train the student alone. With
            ``"none"`` no teacher is built or run, unless a subclass uses it in a loss of its own.
        temperature: temperature of that loss. Default: 1 for ``"kd"``, 4 for ``"cwd"``.
        auxiliary_weight: weight of the loss of the student's auxiliary head.
        ce_weight: weight of the loss on labels.
        kd_weight: weight of the loss on the teacher's outputs. Default: 1 for ``"kd"``, 3 for ``"cwd"``.
        kwargs: the further arguments of ``Distillation`` and ``Task``.

    Raises:
        ValueError: if an argument is out of range; in a step, if a network gives logits of another shape.
    """

    problem_class = Segmentation
    looks_into_teacher = True

    def __init__(
        self,
        student: str | nn.Module,
        teacher: str | nn.Module,
        num_classes: int,
        *,
        loss: Literal["kd", "cwd", "none"] = "kd",
        temperature: float | None = None,
        auxiliary_weight: float = 0.4,
        ce_weight: float = 1.0,
        kd_weight: float | None = None,
        **kwargs: Any,
    ) -> None:
        if loss not in _USUAL:
            raise ValueError(f"loss must be 'kd', 'cwd' or 'none', got {loss!r}: give one of them")
        usual_temperature, usual_weight = _USUAL[loss]
        weight = usual_weight if kd_weight is None else kd_weight
        own = any(
            getattr(type(self), name) is not getattr(SegmentationDistillation, name)
            for name in ("task_loss", "training_step")
        )
        self.needs_teacher = loss != "none" or own
        super().__init__(student, teacher, num_classes, ce_weight=ce_weight, kd_weight=weight, **kwargs)
        check_numbers(above=0, optional=True, temperature=temperature)
        check_numbers(least=0, auxiliary_weight=auxiliary_weight)
        self.loss = loss
        self.temperature = usual_temperature if temperature is None else temperature
        self.auxiliary_weight = auxiliary_weight
        self._taps = {"student": _coarse_taps(self.student)}
        if self.needs_teacher:
            self._taps["teacher"] = _coarse_taps(self.teacher.network)

    def make_problem(self, num_classes: int) -> Segmentation:
        return Segmentation(num_classes, align_corners=True)

    # -- the two networks --------------------------------------------------------------------------------------------

    def student_heads(self, image: Tensor) -> Heads:
        """The student's outputs for images ``[B, C', H, W]``, with graph."""
        return self._heads(self.student(self.format_image(image)), "student")

    @torch.no_grad()
    def teacher_heads(self, image: Tensor) -> Heads:
        """The teacher's outputs for images ``[B, C', H, W]``, without graph."""
        return self._heads(self.teacher.output(image), "teacher")

    def _heads(self, output: Any, who: str) -> Heads:
        main, auxiliary = logits_of(output), auxiliary_logits(output)
        taps = self._taps[who]
        for logits in (main, auxiliary):
            if logits is not None and (logits.ndim != 4 or logits.shape[1] != self.num_classes):
                raise ValueError(
                    f"the {who} gives {list(logits.shape)}, expected [B, {self.num_classes}, h, w]: give a "
                    "segmentation network with that many classes"
                )
        coarse = (main, auxiliary) if not taps else (taps[0].pop(), taps[1].pop() if len(taps) > 1 else None)
        return Heads(
            _float32_or_wider(main),
            _float32_or_wider(auxiliary),
            (_float32_or_wider(coarse[0]), _float32_or_wider(coarse[1])),
        )

    # -- losses ------------------------------------------------------------------------------------------------------

    def task_loss(self, student: Heads, teacher: Heads, target: Tensor) -> Tensor:
        """The loss on the labels ``[B, H, W]``, a scalar, without the factor ``ce_weight``."""
        loss = self.problem.loss(student.main, target)
        if student.auxiliary is not None:
            loss = loss + self.auxiliary_weight * self.problem.loss(student.auxiliary, target)
        return loss

    def distillation_loss(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
        """The loss between two logit maps ``[B, C, h, w]``, a scalar, without the factor ``kd_weight``."""
        if self.loss == "none":
            return 0.0 * student_logits.sum()
        function = pixel_kd_loss if self.loss == "kd" else cwd_loss
        return function(student_logits, teacher_logits, self.temperature)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch = as_batch(batch)
        image, target = batch.image, batch.target
        student = self.student_heads(image)
        teacher = self.teacher_heads(image) if self.needs_teacher else student  # not used then
        terms = {"task": self.ce_weight * self.task_loss(student, teacher, target)}
        if self.loss != "none":
            size: Sequence[int] = student.coarse[0].shape[-2:]
            taught = resized(teacher.coarse[0], size, align_corners=True)
            terms[self.loss] = self.kd_weight * self.distillation_loss(student.coarse[0], taught, target)
        return self.step_loss(terms, student.main, target)


Logits = TypeVar("Logits", Tensor, Tensor | None)


def _float32_or_wider(logits: Logits) -> Logits:
    return logits if logits is None else at_least_float32(logits)[0]


def _coarse_taps(network: nn.Module) -> list[Tap]:
    """Taps on the heads of a torchvision segmentation network, which enlarges its logits itself; else none."""
    if not type(network).__module__.startswith("torchvision.models.segmentation"):
        return []
    names = [name for name in ("classifier", "aux_classifier") if getattr(network, name, None) is not None]
    return [Tap(network, name) for name in names]
