"""Relational knowledge distillation: match distances and angles between the pooled features of a batch.

Wonpyo Park, Dongju Kim, Yan Lu, Minsu Cho. Relational Knowledge Distillation. CVPR 2019, arXiv 1904.05068.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.losses import at_least_float32, check_features
from lightning_kd.core.stage_features import StageMaps
from lightning_kd.distillation.feature_distillation import FeatureDistillation

__all__ = ["RKD", "angle_loss", "distance_loss"]

# largest number of values in an array of cosines or unit vectors that is kept: 64 MiB in float32
AT_ONCE = 2**24


def distance_loss(student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
    """Smooth L1 loss between the distances of the student's and the teacher's features, mean over all ``N^2`` pairs.

    The distances of each network are divided by their mean over pairs of different samples. Pairs of a sample with
    itself count with distance 0.

    Args:
        student_feature: ``[N, D]``, ``N >= 2``; half precision is computed in float32, float64 stays.
        teacher_feature: ``[N, D']``; gets no gradient.

    Returns:
        Scalar.

    Raises:
        ValueError: if the shapes do not match, or there are fewer than two samples.

    Source: arXiv 1904.05068, equation 7, as a mean over pairs.
    """
    check_features(student_feature, teacher_feature)
    student, teacher = at_least_float32(student_feature, teacher_feature.detach())
    with torch.autocast(student.device.type, enabled=False):
        return F.smooth_l1_loss(_distances(student), _distances(teacher))


def angle_loss(student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
    """Smooth L1 loss between the cosines of all angles that three features form, mean over all ``N^3`` triplets.

    Args:
        student_feature: ``[N, D]``, ``N >= 2``; half precision is computed in float32, float64 stays.
        teacher_feature: ``[N, D']``; gets no gradient.

    Returns:
        Scalar.

    Raises:
        ValueError: if the shapes do not match, or there are fewer than two samples.

    Source: arXiv 1904.05068, equation 9, as a mean over triplets.
    """
    check_features(student_feature, teacher_feature)
    student, teacher = at_least_float32(student_feature, teacher_feature.detach())
    count, width = len(student), max(student.shape[1], teacher.shape[1], len(student))

    def of(middle: Tensor) -> Tensor:
        return F.smooth_l1_loss(_cosines(student, middle), _cosines(teacher, middle), reduction="sum")

    parts = torch.arange(count, device=student.device).split(max(1, AT_ONCE // (count * width)))
    with torch.autocast(student.device.type, enabled=False):
        if len(parts) == 1:
            return of(parts[0]) / count**3
        # checkpointed: cosines of large batches are computed again for the gradient, to save memory
        return torch.stack([checkpoint(of, part, use_reentrant=False) for part in parts]).sum() / count**3


class RKD(FeatureDistillation):
    """Relational knowledge distillation (Park et al., CVPR 2019, arXiv 1904.05068), on pooled features.

    The student learns how the images of a batch are placed relative to each other in the teacher's feature space: their
    distances and the angles between them. Student and teacher features may differ in length. The distillation loss is
    ``distance_weight * distance_loss + angle_weight * angle_loss``.

    Args:
        student: see ``Distillation``.
        teacher: see ``Distillation``.
        num_classes: see ``Task``.
        distance_weight: weight of ``distance_loss``.
        angle_weight: weight of ``angle_loss``; 0 saves the computation of ``N^3`` cosines.
        ce_weight: weight of the cross-entropy.
        kd_weight: weight of the sum of both.
        kwargs: the further arguments of ``Distillation`` and ``Task``.

    Raises:
        ValueError: if a weight is negative, and see ``FeatureDistillation``.
    """

    uses_stages = False
    least_batch = 2

    def __init__(
        self,
        student: str | nn.Module,
        teacher: str | nn.Module,
        num_classes: int,
        *,
        distance_weight: float = 25.0,
        angle_weight: float = 50.0,
        ce_weight: float = 1.0,
        kd_weight: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(student, teacher, num_classes, ce_weight=ce_weight, kd_weight=kd_weight, **kwargs)
        check_numbers(least=0, distance_weight=distance_weight, angle_weight=angle_weight)
        self.distance_weight, self.angle_weight = distance_weight, angle_weight

    def feature_loss(self, student: StageMaps, teacher: StageMaps, target: Tensor) -> Tensor:
        assert student.pooled is not None
        assert teacher.pooled is not None
        loss = self.distance_weight * distance_loss(student.pooled, teacher.pooled)
        return loss + self.angle_weight * angle_loss(student.pooled, teacher.pooled) if self.angle_weight else loss


def _distances(feature: Tensor) -> Tensor:
    # not by a matrix product, which is inexact for small distances
    apart = torch.cdist(feature, feature, compute_mode="donot_use_mm_for_euclid_dist").clamp(min=1e-6)
    apart = apart * ~torch.eye(len(feature), dtype=torch.bool, device=feature.device)
    return apart / (apart.sum() / (len(feature) * (len(feature) - 1)))


def _cosines(feature: Tensor, middle: Tensor) -> Tensor:
    """Cosines ``[M, N, N]`` of the angles at ``middle``; 0 and without gradient for vectors of length 0."""
    apart = feature[None] - feature[middle, None]
    length = torch.linalg.vector_norm(apart, dim=2, keepdim=True)
    unit = apart / length.masked_fill(length == 0, torch.inf)  # clamping would give huge gradients
    return unit @ unit.transpose(1, 2)
