"""Weights of candidate labels, always 0 for other labels, and the losses that use them."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.losses import at_least_float32, check_shapes

__all__ = ["candidate_likelihood_loss", "likely_weights", "uniform_weights", "weighted_candidate_loss"]


def check_candidates(candidates: Tensor, letters: str = "BK") -> Tensor:
    """Whether each label is a candidate, bool, after checks.

    Empty rows are looked for on a CPU only: reading values from a GPU would stall it.

    Raises:
        ValueError: if the shape is wrong, or a sample has no candidate.
    """
    check_shapes(candidates=(candidates, letters))
    there = candidates > 0
    if there.device.type == "cpu" and not bool((found := there.any(1)).all()):
        row = int(found.int().argmin())
        raise ValueError(f"candidates must name at least one class a sample, got none in row {row}: add its true label")
    return there


def uniform_weights(candidates: Tensor) -> Tensor:
    """Equal weights of the candidates: ``1 / |S|`` for each of the candidates ``S`` of a sample.

    Args:
        candidates: ``[B, K]``, above 0 where a class is a candidate.

    Returns:
        float32 ``[B, K]``.

    Raises:
        ValueError: if the shape is wrong, or a sample has no candidate.
    """
    there = check_candidates(candidates).float()
    return there / there.sum(1, keepdim=True)


def likely_weights(logits: Tensor, candidates: Tensor) -> Tensor:
    """The network's probabilities, normalised over the candidates: ``S p / sum_j S_j p_j``, without gradient.

    Args:
        logits: ``[B, K]``.
        candidates: ``[B, K]``, above 0 where a class is a candidate (``S = 1``).

    Returns:
        ``[B, K]``, float32 or wider.

    Raises:
        ValueError: if the shapes differ, or a sample has no candidate.

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
    """New weights of the candidates: one gradient step on the old ones, negative values set to 0, then normalised.

    With ``"example"`` the weights of each sample sum to 1; a sample whose weights would all be 0 gets equal ones, and a
    single candidate always has weight 1. With ``"batch"`` the weights of the whole batch sum to 1; a sample whose
    weights are all 0 is left out of the loss (if that holds for all samples, all weights are 0).

    Args:
        weights: ``[B, K]``, the weights before the step; zeros to start from none, where ``step`` has no effect.
        gradient: ``[B, K]``, see ``candidate_meta_gradient``; where it is not finite, neither are the weights.
        candidates: ``[B, K]``, above 0 where a class is a candidate.
        step: step size, at least 0.
        normalization: ``"example"`` or ``"batch"``.

    Returns:
        ``[B, K]``, at least 0 and without gradient; 0 for labels that are no candidates.

    Raises:
        ValueError: if the shapes differ, a sample has no candidate, or an argument is out of range.

    Source: arXiv 2208.12459; normalisation by the batch as in arXiv 1803.09050.
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
    raised = torch.where(total == 0, there.to(raised.dtype), raised)  # NaN is kept, so that it is noticed
    return raised / raised.sum(1, keepdim=True)


def weighted_candidate_loss(logits: Tensor, weights: Tensor) -> Tensor:
    """Cross-entropy with a weight for each label: ``-1/B sum_ij w_ij log p_ij``, a scalar.

    Args:
        logits: ``[B, K]``; half precision is computed in float32.
        weights: ``w``, ``[B, K]``; gets no gradient.

    Raises:
        ValueError: if the shapes differ.
    """
    check_shapes(logits=(logits, "BK"), weights=(weights, "BK"))
    (logits,) = at_least_float32(logits)
    return -(weights.detach() * logits.log_softmax(1)).sum() / len(logits)


def candidate_likelihood_loss(logits: Tensor, candidates: Tensor) -> Tensor:
    """``-log`` of the total probability of a sample's candidates, mean over samples: a scalar.

    Args:
        logits: ``[B, K]``; half precision is computed in float32.
        candidates: ``[B, K]``, above 0 where a class is a candidate.

    Raises:
        ValueError: if the shapes differ, or a sample has no candidate.

    Source: CC, Feng et al., NeurIPS 2020, arXiv 2007.08929.
    """
    check_shapes(logits=(logits, "BK"), candidates=(candidates, "BK"))
    (logits,) = at_least_float32(logits)
    inside = logits.masked_fill(~check_candidates(candidates), -torch.inf)
    return (logits.logsumexp(1) - inside.logsumexp(1)).mean()
