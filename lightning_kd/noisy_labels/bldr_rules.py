"""The rules of BLDR beside its losses: sample weights, the moving average, wrong labels, and updates of rows.

Source: Zong et al., "Noise-Robust Bidirectional Learning with Dynamic Sample Reweighting", arXiv 2209.01334.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_kd.core.losses import check_shapes


def reweight(probability: Tensor, threshold: float = 0.3) -> tuple[Tensor | None, float]:
    """Sample weights and the share of wrong labels, from the negative head's probabilities of the given labels.

    Args:
        probability: ``[n]`` with ``n`` above 0.
        threshold: labels with a lower probability count as wrong.

    Returns:
        Weights ``[n]``, the probabilities scaled linearly to [0, 1], or ``None`` if all are equal; and the share of
            probabilities below ``threshold``.

    Raises:
        ValueError: if the shape is wrong.
    """
    if probability.ndim != 1 or not len(probability):
        raise ValueError(f"probability must be [n] with n above 0, got {list(probability.shape)}: give one a sample")
    low, high = probability.min(), probability.max()
    weight = (probability - low) / (high - low) if high > low else None
    return weight, float((probability < threshold).double().mean())


def average_decay(epoch: int) -> float:
    """Weight of the old average in the update after ``epoch``: ``min(0.9, (1 + epoch) / (10 + epoch))``."""
    return min(0.9, (1 + epoch) / (10 + epoch))


def flag_wrong(probability: Tensor, threshold: float = 0.05) -> Tensor:
    """Whether each label counts as wrong, bool ``[n]``: its probability ``[n]`` is below ``threshold``."""
    return probability < threshold


def update_rows(rows: Tensor, index: Tensor, gradient: Tensor, lr: float) -> None:
    """One step of plain gradient descent on some rows, in place; the cost does not depend on the number of rows.

    Args:
        rows: ``[N, C]``, changed in place.
        index: int64 ``[B]``, the rows that the gradients belong to; gradients of the same row are added.
        gradient: ``[B, C]``; if an entry is not finite, no row is changed, as a gradient scaler then skips the step
            too.
        lr: learning rate.

    Raises:
        ValueError: if the shapes do not match.
    """
    check_shapes(rows=(rows, "NC"), index=(index, "B"), gradient=(gradient, "BC"))
    finite = torch.where(gradient.isfinite().all(), gradient, 0.0)
    rows.index_add_(0, index, finite.to(rows.dtype), alpha=-lr)
