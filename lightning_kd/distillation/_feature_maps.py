"""What the losses on feature maps share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_kd.core.losses import at_least_float32, check_shapes

__all__ = ["comparable_maps", "unit_vectors"]

EPS = 1e-12


def comparable_maps(student_map: Tensor, teacher_map: Tensor) -> tuple[Tensor, Tensor]:
    """Both at the smaller height and width, by average pooling, in float32 at least; the teacher's without gradient.

    Args:
        student_map: ``[N, C, H, W]``.
        teacher_map: ``[N, C', H', W']``.

    Raises:
        ValueError: for other shapes.
    """
    check_shapes(student_map=(student_map, "NCHW"), teacher_map=(teacher_map, "NDhw"))
    height, width = map(min, student_map.shape[2:], teacher_map.shape[2:])
    maps = at_least_float32(student_map, teacher_map.detach())
    first, second = (m if m.shape[2:] == (height, width) else F.adaptive_avg_pool2d(m, (height, width)) for m in maps)
    return first, second


def unit_vectors(x: Tensor, dim: int) -> Tensor:
    """``x`` divided by its L2 norm along ``dim``, or by 1e-12 where that is smaller.

    Zeros stay zeros, and get no gradient: where the norm is 0, the slope is that of its inverse, and huge.
    """
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    return x / norm.clamp(min=EPS).masked_fill(norm == 0, torch.inf)
