"""Scaling to [0, 1]."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["min_max"]


def min_max(values: Tensor, equal: float = 0.0) -> Tensor:
    """``values`` ``[N]`` scaled linearly to [0, 1]; if all values are equal, all become ``equal``."""
    if not len(values):
        return values
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else torch.full_like(values, equal)
