"""Similarity-preserving distillation: images that are similar for the teacher become similar for the student.

Frederick Tung, Greg Mori. Similarity-Preserving Knowledge Distillation. ICCV 2019, arXiv 1907.09682.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_kd.core.losses import at_least_float32, check_shapes
from lightning_kd.core.stage_features import StageMaps
from lightning_kd.distillation._feature_maps import unit_vectors
from lightning_kd.distillation.feature_distillation import FeatureDistillation

__all__ = ["SP", "similarity_loss"]


def similarity_loss(student_map: Tensor, teacher_map: Tensor) -> Tensor:
    """Squared Frobenius norm of the difference between two similarity matrices, divided by ``N^2``.

    The similarity matrix of a network holds the dot products of the flattened maps of each pair of images; each row is
    divided by its L2 norm. The similarity of an image with an all-zero map is 0 to every image.

    Args:
        student_map: ``[N, C, H, W]`` or features ``[N, D]``, ``N >= 2``; half precision is computed in float32, float64
            stays.
        teacher_map: maps or features of the same images, likewise; gets no gradient.

    Returns:
        Scalar.

    Raises:
        ValueError: if the shapes do not match, or there are fewer than two images.

    Source: arXiv 1907.09682, equations 2 to 4.
    """
    maps = student_map.ndim == 4 or teacher_map.ndim == 4
    shapes = ("NCHW", "NDhw") if maps else ("ND", "NE")
    check_shapes(student_map=(student_map, shapes[0]), teacher_map=(teacher_map, shapes[1]))
    if len(student_map) < 2:
        raise ValueError(f"student_map must be of 2 images or more, got {len(student_map)}: take a larger batch")
    student, teacher = (m.flatten(1) for m in at_least_float32(student_map, teacher_map.detach()))
    with torch.autocast(student.device.type, enabled=False):
        first, second = (unit_vectors(m @ m.T, 1) for m in (student, teacher))
    return (first - second).square().mean()


class SP(FeatureDistillation):
    """Similarity-preserving distillation (Tung and Mori, ICCV 2019, arXiv 1907.09682), on the last stage.

    The student learns which images of a batch the teacher represents similarly, measured by the dot products of the
    feature maps of the last stage (see ``similarity_loss``). Maps may differ in size and number of channels.

    Args:
        student: see ``Distillation``.
        teacher: see ``Distillation``.
        num_classes: see ``Task``.
        ce_weight: weight of the cross-entropy.
        kd_weight: weight of ``similarity_loss``.
        kwargs: ``student_stages``, ``teacher_stages`` of ``FeatureDistillation``, and the further arguments of
            ``Distillation`` and ``Task``.

    Raises:
        ValueError: see ``FeatureDistillation``.
    """

    least_batch = 2

    def __init__(
        self,
        student: str | nn.Module,
        teacher: str | nn.Module,
        num_classes: int,
        *,
        ce_weight: float = 1.0,
        kd_weight: float = 3000.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(student, teacher, num_classes, ce_weight=ce_weight, kd_weight=kd_weight, **kwargs)

    def feature_loss(self, student: StageMaps, teacher: StageMaps, target: Tensor) -> Tensor:
        return similarity_loss(student.maps[-1], teacher.maps[-1])
