"""Attention transfer: the student learns the spatial attention maps of the teacher.

Sergey Zagoruyko, Nikos Komodakis. Paying More Attention to Attention: Improving the Performance of Convolutional Neural
Networks via Attention Transfer. ICLR 2017, arXiv 1612.03928.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.stage_features import StageMaps
from lightning_kd.distillation._feature_maps import comparable_maps, unit_vectors
from lightning_kd.distillation.feature_distillation import FeatureDistillation

__all__ = ["AT", "attention_loss"]


def attention_loss(student_map: Tensor, teacher_map: Tensor, p: int = 2) -> Tensor:
    """Mean squared difference between the attention maps of student and teacher, over samples and positions.

    An attention map is the mean over channels of the feature map to the power ``p``, divided by its L2 norm over the
    positions; the scale of a feature map therefore has no effect. If the maps differ in size, the larger one is
    average-pooled first. The paper sums over the positions; the usual weight 1000 belongs to the mean.

    Args:
        student_map: ``[N, C, H, W]``; half precision is computed in float32, float64 stays.
        teacher_map: ``[N, C', H', W']``; gets no gradient.
        p: power, a whole number of at least 1; with an odd power negative values keep their sign.

    Returns:
        Scalar.

    Raises:
        ValueError: if the shapes do not match, or ``p`` is not a whole number above 0.

    Source: arXiv 1612.03928, equation 2, with the mean over positions as in the code of the usual benchmark.
    """
    check_numbers(least=1, whole=True, p=p)
    maps = comparable_maps(student_map, teacher_map)
    student, teacher = (unit_vectors(m.pow(p).mean(1).flatten(1), 1) for m in maps)
    return (student - teacher).square().mean()


class AT(FeatureDistillation):
    """Attention transfer (Zagoruyko and Komodakis, ICLR 2017, arXiv 1612.03928): match spatial attention maps.

    An attention map shows where in the image the features of a stage are strong. The student learns to have the same
    attention maps as the teacher. The distillation loss is the sum of ``attention_loss`` over all stages.

    Args:
        student: see ``Distillation``.
        teacher: see ``Distillation``.
        num_classes: see ``Task``.
        p: power of the attention maps, at least 1.
        ce_weight: weight of the cross-entropy.
        kd_weight: weight of the sum over the stages.
        kwargs: ``student_stages``, ``teacher_stages`` of ``FeatureDistillation``, and the further arguments of
            ``Distillation`` and ``Task``.

    Raises:
        ValueError: if ``p`` is out of range, and see ``FeatureDistillation``.
    """

    def __init__(
        self,
        student: str | nn.Module,
        teacher: str | nn.Module,
        num_classes: int,
        *,
        p: int = 2,
        ce_weight: float = 1.0,
        kd_weight: float = 1000.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(student, teacher, num_classes, ce_weight=ce_weight, kd_weight=kd_weight, **kwargs)
        check_numbers(least=1, whole=True, p=p)
        self.p = p

    def feature_loss(self, student: StageMaps, teacher: StageMaps, target: Tensor) -> Tensor:
        pairs = zip(student.maps, teacher.maps, strict=True)
        return torch.stack([attention_loss(*pair, self.p) for pair in pairs]).sum()
