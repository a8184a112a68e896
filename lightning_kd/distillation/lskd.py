"""Logit standardization: student and teacher need only agree in order and relative distances of the logits.

Shangquan Sun, Wenqi Ren, Jingzhi Li, Rui Wang, Xiaochun Cao. Logit Standardization in Knowledge Distillation. CVPR
2024, arXiv 2403.01427.

It is an option of other methods: ``KD(..., standardize=True)`` and ``DKD(..., standardize=True)``.
"""

from __future__ import annotations

from torch import Tensor

from lightning_kd.core.losses import at_least_float32, check_shapes

__all__ = ["standardize"]


def standardize(logits: Tensor) -> Tensor:
    """Standardize each sample's logits: subtract the mean, divide by ``1e-7`` plus the standard deviation (unbiased).

    Multiplying a sample's logits by a positive number, or adding a number, does not change the result. If all logits of
    a sample are equal, the result is 0 without gradient.

    Args:
        logits: ``[B, C]``, ``C >= 2``; half precision is computed in float32, float64 stays.

    Returns:
        ``[B, C]``.

    Raises:
        ValueError: if the shape is wrong.

    Source: arXiv 2403.01427, algorithm 1; the constant is from the official code.
    """
    check_shapes(logits=(logits, "BC"))
    if logits.shape[1] < 2:
        raise ValueError(f"logits must be [B, C] with at least 2 classes, got {list(logits.shape)}: one logit a class")
    (logits,) = at_least_float32(logits)
    flat = (logits == logits[:, :1]).all(1, keepdim=True)  # without the mask the gradient would be 1e7
    centred = (logits - logits.mean(1, keepdim=True)).masked_fill(flat, 0)
    return centred / (1e-7 + logits.std(1, keepdim=True))
