"""FitNet: a map of the student, brought to the teacher's shape, imitates the teacher's.

Adriana Romero, Nicolas Ballas, Samira Ebrahimi Kahou, Antoine Chassang, Carlo Gatta, Yoshua Bengio. FitNets: Hints for
Thin Deep Nets. ICLR 2015, arXiv 1412.6550.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.losses import at_least_float32
from lightning_kd.core.stage_features import StageMaps
from lightning_kd.distillation.feature_distillation import FeatureDistillation

__all__ = ["FitNet", "Regressor"]


class Regressor(nn.Module):
    """Brings a map of the student to the shape of the teacher's: a convolution, batch normalisation and ReLU.

    A student map twice as large gets a 3x3 convolution of stride 2, one of half the size a transposed 4x4 convolution
    of stride 2, any other a convolution that is as large as what must go. Maps ``[N, C, H, W]`` to ``[N, C', H', W']``.

    Args:
        student_shape: ``(C, H, W)``, or with the batch before it.
        teacher_shape: likewise.

    Raises:
        ValueError: for other lengths, and for a student map that is smaller but not half as large.
    """

    def __init__(self, student_shape: Sequence[int], teacher_shape: Sequence[int]) -> None:
        super().__init__()
        for name, shape in (("student_shape", student_shape), ("teacher_shape", teacher_shape)):
            if len(shape) not in (3, 4):
                raise ValueError(f"{name} must be (C, H, W), got {tuple(shape)}: give the shape of one map")
        (c, *size), (out, *wanted) = student_shape[-3:], teacher_shape[-3:]
        kernel = [1 + s - t for s, t in zip(size, wanted, strict=True)]
        if size == [2 * side for side in wanted]:
            self.conv: nn.Module = nn.Conv2d(c, out, 3, stride=2, padding=1)
        elif wanted == [2 * side for side in size]:
            self.conv = nn.ConvTranspose2d(c, out, 4, stride=2, padding=1)
        elif min(kernel) > 0:
            self.conv = nn.Conv2d(c, out, (kernel[0], kernel[1]))
        else:
            raise ValueError(
                f"student_shape must be as large as teacher_shape {tuple(teacher_shape)} or half of it, got "
                f"{tuple(student_shape)}: take maps of other stages"
            )
        self.bn = nn.BatchNorm2d(out)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(x)))


class FitNet(FeatureDistillation):
    """FitNets (Romero et al., ICLR 2015, arXiv 1412.6550), in one stage as in the usual benchmark.

    The loss is the mean squared error of the regressed map of one student stage to the teacher's, the mean over all
    values.

    Args:
        student: see ``Distillation``.
        teacher: see ``Distillation``.
        num_classes: see ``Task``.
        hint_stage: which stage is the hint, counted from 1.
        ce_weight: weight of the cross-entropy.
        kd_weight: weight of the mean squared error.
        kwargs: ``student_stages``, ``teacher_stages`` of ``FeatureDistillation``, and the further arguments of
            ``Distillation`` and ``Task``.

    Raises:
        ValueError: for a stage that there is not, and as ``Regressor``.
    """

    least_batch = 2  # of the batch normalisation of 1x1 maps

    def __init__(
        self,
        student: str | nn.Module,
        teacher: str | nn.Module,
        num_classes: int,
        *,
        hint_stage: int = 2,
        ce_weight: float = 1.0,
        kd_weight: float = 100.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(student, teacher, num_classes, ce_weight=ce_weight, kd_weight=kd_weight, **kwargs)
        shapes = [features.shapes.maps for features in (self.student_features, self.teacher_features)]
        check_numbers(least=1, most=len(shapes[0]), whole=True, hint_stage=hint_stage)
        self.hint_stage = hint_stage
        self.regressor = self.training_part(Regressor(*(maps[hint_stage - 1] for maps in shapes)))

    def feature_loss(self, student: StageMaps, teacher: StageMaps, target: Tensor) -> Tensor:
        hinted = self.regressor(student.maps[self.hint_stage - 1])
        hinted, hint = at_least_float32(hinted, teacher.maps[self.hint_stage - 1])
        return F.mse_loss(hinted, hint)
