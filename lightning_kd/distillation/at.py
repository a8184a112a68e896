"""Attention transfer: the student looks where the teacher looks.

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
    """The mean squared difference of the attention of both, over samples and positions.

    Attention is the mean over channels of the map to the power ``p``, divided by its L2 norm over the positions, so
    that the scale of a map does not count. Of maps of two sizes the larger is average-pooled first. The paper sums over
    the positions; the mean belongs to the weight 1000.

    Args:
        student_map: ``[N, C, H, W]``; half precision is computed in float32, float64 stays.
        teacher_map: ``[N, C', H', W']``; gets no gradient.
        p: a whole number; with an odd one values below 0 keep their sign.

    Returns:
        Scalar.

    Raises:
        ValueError: for other shapes, and ``p`` that is no whole number above 0.

    Source: arXiv 1612.03928, equation 2, with the mean over positions as in the code of the usual benchmark.
    """
    check_numbers(least=1, whole=True, p=p)
    maps = comparable_maps(student_map, teacher_map)
    student, teacher = (unit_vectors(m.pow(p).mean(1).flatten(1), 1) for m in maps)
    return (student - teacher).square().mean()


class AT(FeatureDistillation):
    """Attention transfer (Zagoruyko and Komodakis, ICLR 2017, arXiv 1612.03928): ``attention_loss`` of all stages.

    Args:
        student: see ``Distillation``.
        teacher: see ``Distillation``.
        num_classes: see ``Task``.
        p: power of the attention.
        ce_weight: weight of the cross-entropy.
        kd_weight: weight of the sum over the stages.
        kwargs: ``student_stages``, ``teacher_stages`` of ``FeatureDistillation``, and the further arguments of
            ``Distillation`` and ``Task``.
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
