"""Neuron selectivity transfer: match the distributions of the channels of both networks.

Zehao Huang, Naiyan Wang. Like What You Like: Knowledge Distill via Neuron Selectivity Transfer. 2017, arXiv 1707.01219.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_kd.core.stage_features import StageMaps
from lightning_kd.distillation._feature_maps import comparable_maps, unit_vectors
from lightning_kd.distillation.feature_distillation import FeatureDistillation

__all__ = ["NST", "nst_loss"]


def nst_loss(student_map: Tensor, teacher_map: Tensor) -> Tensor:
    """Squared maximum mean discrepancy between the channels of student and teacher, mean over samples.

    Each channel of a map is a vector over the positions, divided by its L2 norm, and the kernel is
    ``k(a, b) = <a, b>^2``. The loss is the mean of ``k`` over all pairs of teacher channels, plus that over pairs of
    student channels, minus twice that over pairs of one each. If the maps differ in size, the larger one is
    average-pooled first.

    Args:
        student_map: ``[N, C, H, W]``; half precision is computed in float32, float64 stays.
        teacher_map: ``[N, C', H', W']``; gets no gradient.

    Returns:
        Scalar.

    Raises:
        ValueError: if the shapes do not match.

    Source: arXiv 1707.01219, equation 7 with the polynomial kernel (``d = 2``, ``c = 0``).
    """
    student, teacher = (unit_vectors(m.flatten(2), 2) for m in comparable_maps(student_map, teacher_map))
    (_, s, positions), t = student.shape, teacher.shape[1]
    with torch.autocast(student.device.type, enabled=False):
        if 2 * positions**2 < s * s + t * t + s * t:
            # the same value from Gram matrices over positions, which is cheaper with few positions
            first, second = (x.transpose(1, 2) @ x / x.shape[1] for x in (student, teacher))
            return (first - second).square().sum((1, 2)).mean()
        own, others = _mean_kernel(student, student), _mean_kernel(teacher, teacher)
        return others + own - 2 * _mean_kernel(student, teacher)


def _mean_kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.transpose(1, 2)).square().mean()


class NST(FeatureDistillation):
    """Neuron selectivity transfer (Huang and Wang, 2017, arXiv 1707.01219): match the distributions of channels.

    Each channel of a feature map responds to certain regions of the image. The student's channels are trained to have
    the same distribution of response patterns as the teacher's, whatever their number and order. The distillation loss
    is the sum of ``nst_loss`` over all stages.

    Args:
        student: see ``Distillation``.
        teacher: see ``Distillation``.
        num_classes: see ``Task``.
        ce_weight: weight of the cross-entropy.
        kd_weight: weight of the sum over the stages.
        kwargs: ``student_stages``, ``teacher_stages`` of ``FeatureDistillation``, and the further arguments of
            ``Distillation`` and ``Task``.

    Raises:
        ValueError: see ``FeatureDistillation``.
    """

    def __init__(
        self,
        student: str | nn.Module,
        teacher: str | nn.Module,
        num_classes: int,
        *,
        ce_weight: float = 1.0,
        kd_weight: float = 50.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(student, teacher, num_classes, ce_weight=ce_weight, kd_weight=kd_weight, **kwargs)

    def feature_loss(self, student: StageMaps, teacher: StageMaps, target: Tensor) -> Tensor:
        return torch.stack([nst_loss(*pair) for pair in zip(student.maps, teacher.maps, strict=True)]).sum()
