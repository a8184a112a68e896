"""Relations between the pooled features of a batch: their distances and angles.

Wonpyo Park, Dongju Kim, Yan Lu, Minsu Cho. Relational Knowledge Distillation. CVPR 2019, arXiv 1904.05068.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_kd.core.losses import at_least_float32, check_features

__all__ = ["angle_loss", "distance_loss"]

# numbers of an array of cosines or unit vectors that is kept, at most: 64 MiB in float32
AT_ONCE = 2**24


def distance_loss(student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
    """How differently the features lie apart: smooth L1 of their distances, the mean over all ``N^2``.

    On each side distances are divided by the mean of those between different samples; the diagonal counts, as 0.

    Args:
        student_feature: ``[N, D]``, at least two; half precision is computed in float32, float64 stays.
        teacher_feature: ``[N, D']``; gets no gradient.

    Raises:
        ValueError: for other shapes, and for fewer than two samples.

    Source: arXiv 1904.05068, equation 7, as a mean over pairs.
    """
    check_features(student_feature, teacher_feature)
    student, teacher = at_least_float32(student_feature, teacher_feature.detach())
    return F.smooth_l1_loss(_distances(student), _distances(teacher))


def angle_loss(student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
    """How differently the features see each other: smooth L1 of the cosines at each sample, the mean over all ``N^3``.

    Args:
        student_feature: ``[N, D]``, at least two; half precision is computed in float32, float64 stays.
        teacher_feature: ``[N, D']``; gets no gradient.

    Raises:
        ValueError: for other shapes, and for fewer than two samples.

    Source: arXiv 1904.05068, equation 9, as a mean over triplets.
    """
    check_features(student_feature, teacher_feature)
    student, teacher = at_least_float32(student_feature, teacher_feature.detach())
    count, width = len(student), max(student.shape[1], teacher.shape[1], len(student))

    def of(middle: Tensor) -> Tensor:
        return F.smooth_l1_loss(_cosines(student, middle), _cosines(teacher, middle), reduction="sum")

    parts = torch.arange(count, device=student.device).split(max(1, AT_ONCE // (count * width)))
    if len(parts) == 1:
        return of(parts[0]) / count**3
    # cosines of many are computed again for the gradient, not kept
    return torch.stack([checkpoint(of, part, use_reentrant=False) for part in parts]).sum() / count**3


def _distances(feature: Tensor) -> Tensor:
    # not by a product of matrices: it loses what small distances are made of
    apart = torch.cdist(feature, feature, compute_mode="donot_use_mm_for_euclid_dist").clamp(min=1e-6)
    apart = apart * ~torch.eye(len(feature), dtype=torch.bool, device=feature.device)
    return apart / (apart.sum() / (len(feature) * (len(feature) - 1)))


def _cosines(feature: Tensor, middle: Tensor) -> Tensor:
    """Of the unit vectors from ``middle`` to all: ``[M, N, N]``; a vector of length 0 has 0, and no gradient."""
    apart = feature[None] - feature[middle, None]
    length = torch.linalg.vector_norm(apart, dim=2, keepdim=True)
    unit = apart / length.masked_fill(length == 0, torch.inf)  # a floor would be a slope of its inverse there
    return unit @ unit.transpose(1, 2)
