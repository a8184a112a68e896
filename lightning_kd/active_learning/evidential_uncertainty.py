"""Evidence for classes, and what it leaves open."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lightning_kd.core.dirichlet import dirichlet_kl, dirichlet_nll
from lightning_kd.core.losses import check_positive, check_shapes

Discrepancy = Literal["l1", "js"]
LOGIT_LIMIT = 10.0


class DirichletUncertainties(NamedTuple):
    """What a Dirichlet distribution over ``K`` classes leaves open, float64 ``[N]`` each.

    Attributes:
        total: entropy of the mean.
        data: expected entropy: the classes overlap.
        distribution: what is left of ``total``, the mutual information of class and distribution: evidence is missing.
        vacuity: ``K`` over the sum of alpha.
        differential_entropy: of the distribution itself.
    """

    total: Tensor
    data: Tensor
    distribution: Tensor
    vacuity: Tensor
    differential_entropy: Tensor


def dirichlet_uncertainties(alpha: Tensor) -> DirichletUncertainties:
    """The uncertainties of ``Dirichlet(alpha)`` in closed form, computed in float64.

    The one of the distribution is a small difference of two numbers, which float32 would lose; it is never negative.

    Args:
        alpha: ``[..., K]`` with K at least 2, any real dtype, above 0.

    Returns:
        Five tensors ``[...]`` in float64.

    Raises:
        ValueError: for an alpha that is not above 0 or not finite, and for fewer than 2 classes.

    Source: the mutual information of Malinin and Gales, arXiv 1802.10501; used by arXiv 2409.17607.
    """
    if alpha.ndim < 1 or alpha.shape[-1] < 2:
        raise ValueError(
            f"alpha must be [..., K] with K at least 2, got {list(alpha.shape)}: one class is never unsure"
        )
    if not ((alpha > 0) & (alpha < torch.inf)).all():
        low, high = float(alpha.min()), float(alpha.max())
        raise ValueError(f"alpha must be above 0 and finite, got {low} to {high}: give evidence + 1")
    alpha = wide(alpha.cpu() if alpha.device.type == "mps" else alpha)
    strength = alpha.sum(-1)
    p = alpha / strength[..., None]
    total = torch.special.entr(p).sum(-1)
    data = (p * (torch.digamma(strength + 1)[..., None] - torch.digamma(alpha + 1))).sum(-1)
    log_normaliser = torch.lgamma(alpha).sum(-1) - torch.lgamma(strength)
    entropy = (
        log_normaliser
        + (strength - alpha.shape[-1]) * torch.digamma(strength)
        - ((alpha - 1) * torch.digamma(alpha)).sum(-1)
    )
    return DirichletUncertainties(total, data, (total - data).clamp_min(0), alpha.shape[-1] / strength, entropy)


def evidence_alpha(logits: Tensor, gamma: float = 1.0) -> Tensor:
    """``exp(logits) / gamma + 1``, float64 (float32 on MPS); logits are clamped to [-10, 10]."""
    check_positive(gamma=gamma)
    return clamped(wide(logits)).exp() / gamma + 1


def clamped(logits: Tensor) -> Tensor:
    """Within [-10, 10]; what was outside gets no gradient."""
    return logits.clamp(-LOGIT_LIMIT, LOGIT_LIMIT)


def evidential_nll(logits: Tensor, target: Tensor, gamma: float = 1.0) -> Tensor:
    """``core.dirichlet.dirichlet_nll`` of logits clamped to [-10, 10], ``[B]``.

    Args:
        logits: ``[B, K]`` of one head.
        target: int64 ``[B]``, 0 to K-1.
        gamma: ``alpha = exp(logits) / gamma + 1``; above 0.
    """
    return dirichlet_nll(clamped(logits), target, gamma)


def evidential_kl(logits: Tensor, target: Tensor | None, gamma: float = 1.0) -> Tensor:
    """``core.dirichlet.dirichlet_kl`` of logits clamped to [-10, 10], ``[B]``; not yet divided by K.

    Args:
        logits: ``[B, K]`` of one head.
        target: int64 ``[B]``, 0 to K-1, whose evidence is left out; ``None`` leaves none out, for samples of no class.
        gamma: ``alpha = exp(logits) / gamma + 1``; above 0.
    """
    return dirichlet_kl(clamped(logits), target, gamma)


def head_discrepancy(first: Tensor, second: Tensor, measure: Discrepancy = "l1") -> Tensor:
    """How far two heads' predictions are apart.

    Args:
        first: probabilities ``[B, K]``.
        second: likewise.
        measure: ``"l1"``: the mean over classes of the absolute difference, at most ``2 / K``; ``"js"``: the
            Jensen-Shannon divergence, at most ``log 2``.

    Returns:
        ``[B]``, 0 where they are equal.

    Raises:
        ValueError: for two shapes, and another measure.
    """
    if measure not in get_args(Discrepancy):
        raise ValueError(
            f"measure must be one of {', '.join(get_args(Discrepancy))}, got {measure!r}: give one of them"
        )
    check_shapes(first=(first, "BK"), second=(second, "BK"))
    if measure == "l1":
        return (first - second).abs().mean(1)
    mean = (first + second) / 2
    return sum(0.5 * (p * (p.log() - mean.log())).sum(1) for p in (first, second))  # type: ignore[return-value]


def dirichlet_mean(alpha: Tensor) -> Tensor:
    """Expected probabilities, of the shape of ``alpha``."""
    return alpha / alpha.sum(-1, keepdim=True)


def wide(values: Tensor) -> Tensor:
    """Float64, or float32 on MPS, which has no other."""
    return values.float() if values.device.type == "mps" else values.double()
