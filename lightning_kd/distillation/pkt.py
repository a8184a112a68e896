"""Relations between the pooled features of a batch: how probable each makes the others.

Nikolaos Passalis, Anastasios Tefas. Learning Deep Representations with Probabilistic Knowledge Transfer. ECCV 2018,
arXiv 1803.10837.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_kd.core.losses import at_least_float32, check_features

__all__ = ["pkt_loss"]

EPS = 1e-7


def pkt_loss(student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
    """The mean over all ``N^2`` of ``p log(p / q)``, with ``p`` of the teacher and ``q`` of the student.

    They are ``(cosine + 1) / 2`` of each pair of samples, one with itself too, each row divided by its sum.

    Args:
        student_feature: ``[N, D]``, at least two; half precision is computed in float32, float64 stays.
        teacher_feature: ``[N, D']``; gets no gradient.

    Raises:
        ValueError: for other shapes, and for fewer than two samples.

    Source: arXiv 1803.10837, equations 7 and 8 with the cosine kernel, as the mean over pairs.
    """
    check_features(student_feature, teacher_feature)
    student, teacher = (_likeness(f) for f in at_least_float32(student_feature, teacher_feature.detach()))
    return (teacher * ((teacher + EPS) / (student + EPS)).log()).mean()


def _likeness(feature: Tensor) -> Tensor:
    # a feature of zeros has the cosine 0 with all
    unit = feature / (torch.linalg.vector_norm(feature, dim=1, keepdim=True) + EPS)
    likeness = (unit @ unit.T + 1) / 2
    return likeness / likeness.sum(1, keepdim=True)
