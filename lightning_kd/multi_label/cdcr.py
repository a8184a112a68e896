"""CDCR: labels of which some are false are trusted as far as the network is confident of them.

Feng Sun, Ming-Kun Xie, Sheng-Jun Huang. A Deep Model for Partial Multi-Label Image Classification with
Curriculum Based Disambiguation. arXiv 2207.02410.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.losses import check_label_values, check_shapes

__all__ = ["candidate_thresholds", "select_candidates"]


def candidate_thresholds(confidence: Tensor, candidates: Tensor, alpha: float, by_difficulty: bool = False) -> Tensor:
    """The confidence from which on a candidate of each class is trusted, float64 ``[C]``.

    ``alpha`` for all or, ``by_difficulty``, ``alpha + mean_c - mean`` with the mean confidence of the candidates of the
    class and that of all candidates: where the network is sure in any case, it must be surer.

    Args:
        confidence: ``[n, C]`` in [0, 1].
        candidates: ``[n, C]`` of 1 and 0.
        alpha: in (0, 1).
        by_difficulty: see above. A class without candidates has ``alpha``.

    Raises:
        ValueError: as ``select_candidates``.
    """
    check_numbers(above=0, below=1, alpha=alpha)
    check_shapes(confidence=(confidence, "nC"), candidates=(candidates, "nC"))
    check_label_values(candidates, (0, 1), "candidates")
    classes = confidence.shape[1]
    if not by_difficulty:
        return torch.full((classes,), alpha, dtype=torch.float64, device=confidence.device)
    there = candidates > 0
    sums, counts = (confidence.double() * there).sum(0), there.sum(0)
    own = sums / counts.clamp(min=1)
    mean = sums.sum() / counts.sum().clamp(min=1)
    return torch.where(counts > 0, alpha + own - mean, alpha)


def select_candidates(confidence: Tensor, candidates: Tensor, alpha: float, by_difficulty: bool = False) -> Tensor:
    """Which labels enter the loss, bool ``[n, C]``: all that are no candidates, and the candidates that are trusted.

    Args:
        confidence: probabilities ``[n, C]`` of the network for the weakly augmented images.
        candidates: ``[n, C]``: 1 for a candidate, 0 for a label that is surely not there.
        alpha: a candidate of this confidence or more is trusted, in (0, 1).
        by_difficulty: shift ``alpha`` for each class, see ``candidate_thresholds``.

    Raises:
        ValueError: for shapes that differ, ``alpha`` out of range, confidences that are NaN, and other values in
            ``candidates``.

    Source: arXiv 2207.02410, as in the official code.
    """
    threshold = candidate_thresholds(confidence, candidates, alpha, by_difficulty)
    if confidence.isnan().any():
        raise ValueError("confidence must be a number for each sample, got NaN: some were not looked at")
    return (candidates == 0) | (confidence.double() >= threshold)
