"""Probabilistic knowledge transfer: match the similarities between the pooled features of a batch.

Nikolaos Passalis, Anastasios Tefas. Learning Deep Representations with Probabilistic Knowledge Transfer. ECCV 2018,
arXiv 1803.10837.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_kd.core.losses import at_least_float32, check_features
from lightning_kd.core.stage_features import StageMaps
from lightning_kd.distillation.feature_distillation import FeatureDistillation

__all__ = ["PKT", "pkt_loss"]

EPS = 1e-7


def pkt_loss(student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
    """``p log(p / q)``, mean over all ``N^2`` pairs, with similarities ``p`` of the teacher and ``q`` of the student.

    The similarity of a pair of samples (also of a sample with itself) is ``(cosine + 1) / 2``; each row is divided by
    its sum.

    Args:
        student_feature: ``[N, D]``, ``N >= 2``; half precision is computed in float32, float64 stays.
        teacher_feature: ``[N, D']``; gets no gradient.

    Returns:
        Scalar.

    Raises:
        ValueError: if the shapes do not match, or there are fewer than two samples.

    Source: arXiv 1803.10837, equations 7 and 8 with the cosine kernel, as the mean over pairs.
    """
    check_features(student_feature, teacher_feature)
    student, teacher = at_least_float32(student_feature, teacher_feature.detach())
    with torch.autocast(student.device.type, enabled=False):
        student, teacher = _similarity_rows(student), _similarity_rows(teacher)
    return (teacher * ((teacher + EPS) / (student + EPS)).log()).mean()


def _similarity_rows(feature: Tensor) -> Tensor:
    length = torch.linalg.vector_norm(feature, dim=1, keepdim=True)
    # a zero feature has cosine 0 with all others and no gradient, which would be 1e7 times that of others
    unit = feature / (length + EPS).masked_fill(length == 0, torch.inf)
    similarity = (unit @ unit.T + 1) / 2
    return similarity / similarity.sum(1, keepdim=True)


class PKT(FeatureDistillation):
    """Probabilistic knowledge transfer (Passalis and Tefas, ECCV 2018, arXiv 1803.10837), on pooled features.

    The student learns which images of a batch are similar to each other for the teacher. Similarity is measured by the
    cosine of pooled features and treated as a probability distribution (see ``pkt_loss``). Student and teacher features
    may differ in length.

    Args:
        student: see ``Distillation``.
        teacher: see ``Distillation``.
        num_classes: see ``Task``.
        ce_weight: weight of the cross-entropy.
        kd_weight: weight of ``pkt_loss``.
        kwargs: the further arguments of ``Distillation`` and ``Task``.

    Raises:
        ValueError: see ``FeatureDistillation``.
    """

    uses_stages = False
    least_batch = 2

    def __init__(
        self,
        student: str | nn.Module,
        teacher: str | nn.Module,
        num_classes: int,
        *,
        ce_weight: float = 1.0,
        kd_weight: float = 30000.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(student, teacher, num_classes, ce_weight=ce_weight, kd_weight=kd_weight, **kwargs)

    def feature_loss(self, student: StageMaps, teacher: StageMaps, target: Tensor) -> Tensor:
        assert student.pooled is not None
        assert teacher.pooled is not None
        return pkt_loss(student.pooled, teacher.pooled)
