"""FitNet: a feature map of the student, brought to the teacher's shape, is trained to equal the teacher's.

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
    """Bring a student's map to the shape of the teacher's: a convolution, batch normalisation and ReLU.

    Maps ``[N, C, H, W]`` become ``[N, C', H', W']``. A map of twice the size gets a 3x3 convolution of stride 2, one of
    half the size a transposed 4x4 convolution of stride 2, and any other larger map a convolution without padding whose
    kernel gives the right size.

    Args:
        student_shape: ``(C, H, W)``, or the same with a batch dimension before it.
        teacher_shape: ``(C', H', W')``, likewise.

    Raises:
        ValueError: if a shape has another length, or the student's map is smaller but not half as large.
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
    """FitNets (Romero et al., ICLR 2015, arXiv 1412.6550): match one feature map, the hint.

    A feature map of one student stage is brought to the shape of the teacher's by a trained convolution
    (``Regressor``). The loss is the mean squared error between both maps, mean over all values. Unlike in the paper
    there is only one training stage, as in the usual benchmark.

    Args:
        student: see ``Distillation``.
        teacher: see ``Distillation``.
        num_classes: see ``Task``.
        hint_stage: number of the stage, counted from 1.
        ce_weight: weight of the cross-entropy.
        kd_weight: weight of the mean squared error.
        kwargs: ``student_stages``, ``teacher_stages`` of ``FeatureDistillation``, and the further arguments of
            ``Distillation`` and ``Task``.

    Raises:
        ValueError: if the stage does not exist, and see ``Regressor``.
    """

    least_batch = 2  # for batch normalisation of 1x1 maps

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
