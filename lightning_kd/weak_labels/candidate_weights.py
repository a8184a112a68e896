"""Weights of candidate labels, 0 off the candidates, and the losses of them."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.losses import at_least_float32, check_shapes

__all__ = ["candidate_likelihood_loss", "likely_weights", "uniform_weights", "weighted_candidate_loss"]


def check_candidates(candidates: Tensor, letters: str = "BK") -> Tensor:
    """Which labels are candidates, bool. Whether a row is empty is looked at on a CPU only: a GPU would have to wait.

    Raises:
        ValueError: for another shape, and for a sample without any candidate.
    """
    check_shapes(candidates=(candidates, letters))
    there = candidates > 0
    if there.device.type == "cpu" and not bool((found := there.any(1)).all()):
        row = int(found.int().argmin())
        raise ValueError(f"candidates must name at least one class a sample, got none in row {row}: add its true label")
    return there


def uniform_weights(candidates: Tensor) -> Tensor:
    """``1 / |S|`` on the candidates ``S`` of each sample.

    Args:
        candidates: ``[B, K]``, above 0 where a class is a candidate.

    Returns:
        float32 ``[B, K]``.

    Raises:
        ValueError: for another shape, and a sample without any candidate.
    """
    there = check_candidates(candidates).float()
    return there / there.sum(1, keepdim=True)


def likely_weights(logits: Tensor, candidates: Tensor) -> Tensor:
    """The probabilities of the candidates alone, ``S p / sum_j S_j p_j``, without gradient.

    Args:
        logits: ``[B, K]``.
        candidates: ``[B, K]``, above 0 where a class is a candidate.

    Returns:
        ``[B, K]``, at least float32.

    Raises:
        ValueError: for shapes that differ, and a sample without any candidate.

    Source: Lv et al., PRODEN, arXiv 2002.08053, equation 8.
    """
    check_shapes(logits=(logits, "BK"), candidates=(candidates, "BK"))
    (logits,) = at_least_float32(logits.detach())
    return logits.masked_fill(~check_candidates(candidates), -torch.inf).softmax(1)


def updated_weights(
    weights: Tensor,
    gradient: Tensor,
    candidates: Tensor,
    step: float,
    normalization: Literal["example", "batch"] = "example",
) -> Tensor:
    """New weights of the candidates: a step against the meta gradient, cut off at 0, and normalised.

    By ``"example"`` those of each sample sum to 1, and a sample whose candidates would all get 0 has equal ones; a
    single candidate so always has 1. By ``"batch"`` all of the batch sum to 1, and such a sample drops out (if all do,
    all are 0).

    Args:
        weights: ``[B, K]`` before; zeros for the start without memory, where ``step`` then does not matter.
        gradient: ``[B, K]`` of ``candidate_meta_gradient``; where it is not finite, no weights are.
        candidates: ``[B, K]``, above 0 where a class is a candidate.
        step: 0 or more.
        normalization: ``"example"`` or ``"batch"``.

    Returns:
        ``[B, K]``, at least 0, without gradient; 0 off the candidates.

    Raises:
        ValueError: for shapes that differ, a sample without candidates, and arguments out of range.

    Source: arXiv 2208.12459; normalised by the batch as in arXiv 1803.09050.
    """
    check_numbers(least=0, step=step)
    if normalization not in ("example", "batch"):
        raise ValueError(f"normalization must be 'example' or 'batch', got {normalization!r}: give one of them")
    check_shapes(weights=(weights, "BK"), gradient=(gradient, "BK"), candidates=(candidates, "BK"))
    there = check_candidates(candidates)
    weights, gradient = at_least_float32(weights.detach(), gradient.detach())
    raised = (weights - step * gradient).clamp(min=0).masked_fill(~there, 0.0)
    if normalization == "batch":
        total = raised.sum()
        return raised / torch.where(total > 0, total, 1.0)
    total = raised.sum(1, keepdim=True)
    raised = torch.where(total == 0, there.to(raised.dtype), raised)  # NaN stays, for all to see
    return raised / raised.sum(1, keepdim=True)


def weighted_candidate_loss(logits: Tensor, weights: Tensor) -> Tensor:
    """Cross-entropy with each label by its weight: ``-1/B sum_ij w_ij log p_ij``.

    Args:
        logits: ``[B, K]``, with graph; half precision is computed in float32.
        weights: ``[B, K]``, taken as constant.

    Raises:
        ValueError: for shapes that differ.
    """
    check_shapes(logits=(logits, "BK"), weights=(weights, "BK"))
    (logits,) = at_least_float32(logits)
    return -(weights.detach() * logits.log_softmax(1)).sum() / len(logits)


def candidate_likelihood_loss(logits: Tensor, candidates: Tensor) -> Tensor:
    """``-log`` of the probability that the class is a candidate, the mean over samples.

    Args:
        logits: ``[B, K]``, with graph.
        candidates: ``[B, K]``, above 0 where a class is a candidate.

    Raises:
        ValueError: for shapes that differ, and a sample without any candidate.

    Source: CC, Feng et al., NeurIPS 2020, arXiv 2007.08929.
    """
    check_shapes(logits=(logits, "BK"), candidates=(candidates, "BK"))
    (logits,) = at_least_float32(logits)
    inside = logits.masked_fill(~check_candidates(candidates), -torch.inf)
    return (logits.logsumexp(1) - inside.logsumexp(1)).mean()
