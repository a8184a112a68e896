"""Shared parts of the losses on feature maps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_kd.core.losses import at_least_float32, check_shapes

__all__ = ["comparable_maps", "unit_vectors"]

EPS = 1e-12


def comparable_maps(student_map: Tensor, teacher_map: Tensor) -> tuple[Tensor, Tensor]:
    """Bring both maps to the smaller height and width by average pooling.

    Args:
        student_map: ``[N, C, H, W]``.
        teacher_map: ``[N, C', H', W']``; the result has no gradient.

    Returns:
        both maps, at least float32.

    Raises:
        ValueError: if the shapes do not match.
    """
    check_shapes(student_map=(student_map, "NCHW"), teacher_map=(teacher_map, "NDhw"))
    height, width = map(min, student_map.shape[2:], teacher_map.shape[2:])
    maps = at_least_float32(student_map, teacher_map.detach())
    first, second = (m if m.shape[2:] == (height, width) else F.adaptive_avg_pool2d(m, (height, width)) for m in maps)
    return first, second


def unit_vectors(x: Tensor, dim: int) -> Tensor:
    """``x`` divided by its L2 norm along ``dim``, which is taken to be at least 1e-12.

    Zero vectors stay zero and get no gradient, which would be huge (the inverse of the norm).
    """
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    return x / norm.clamp(min=EPS).masked_fill(norm == 0, torch.inf)
