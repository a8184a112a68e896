"""Uncertainties and losses of evidential networks, whose outputs are the parameters of a Dirichlet distribution."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lightning_kd.core.dirichlet import dirichlet_kl, dirichlet_nll
from lightning_kd.core.losses import at_least_float32, check_positive, check_shapes

Discrepancy = Literal["l1", "js"]
LOGIT_LIMIT = 10.0


class DirichletUncertainties(NamedTuple):
    """Uncertainties of a Dirichlet distribution over ``K`` classes, float64 ``[N]`` each, entropies in nats.

    Attributes:
        total: entropy of the mean probabilities.
        data: expected entropy, large where the classes overlap.
        distribution: ``total - data``, the mutual information of class and probabilities, large where evidence is
            missing.
        vacuity: ``K`` divided by the sum of alpha.
        differential_entropy: differential entropy of the Dirichlet distribution.
    """

    total: Tensor
    data: Tensor
    distribution: Tensor
    vacuity: Tensor
    differential_entropy: Tensor


def dirichlet_uncertainties(alpha: Tensor) -> DirichletUncertainties:
    """The uncertainties of ``Dirichlet(alpha)`` in closed form, computed in float64.

    ``distribution`` is a small difference of two numbers, for which float32 is not precise enough; it is never
    negative.

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
            f"alpha must be [..., K] with K at least 2, got {list(alpha.shape)}: give one number for each class"
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
    """The Dirichlet parameters ``exp(logits) / gamma + 1``, float64 (float32 on MPS); logits clamped to [-10, 10]."""
    check_positive(gamma=gamma)
    return clamped(wide(logits)).exp() / gamma + 1


def clamped(logits: Tensor) -> Tensor:
    """Logits clamped to [-10, 10]; those outside get no gradient."""
    return logits.clamp(-LOGIT_LIMIT, LOGIT_LIMIT)


def evidential_nll(logits: Tensor, target: Tensor, gamma: float = 1.0) -> Tensor:
    """The negative log-likelihood ``core.dirichlet.dirichlet_nll`` of logits clamped to [-10, 10].

    Args:
        logits: ``[B, K]`` of one head.
        target: int64 ``[B]``, 0 to K-1.
        gamma: ``alpha = exp(logits) / gamma + 1``; above 0. Default: 1.

    Returns:
        ``[B]``, not averaged.
    """
    return dirichlet_nll(clamped(logits), target, gamma)


def evidential_kl(logits: Tensor, target: Tensor | None, gamma: float = 1.0) -> Tensor:
    """The divergence from the uniform Dirichlet, ``core.dirichlet.dirichlet_kl``, of logits clamped to [-10, 10].

    Args:
        logits: ``[B, K]`` of one head.
        target: int64 ``[B]``, 0 to K-1: evidence for the sample's own class does not count. ``None``: all evidence
            counts, for samples of no known class.
        gamma: ``alpha = exp(logits) / gamma + 1``; above 0. Default: 1.

    Returns:
        ``[B]``, not averaged and not divided by K.
    """
    return dirichlet_kl(clamped(logits), target, gamma)


def head_discrepancy(first: Tensor, second: Tensor, measure: Discrepancy = "l1") -> Tensor:
    """The distance between the predictions of two heads.

    Args:
        first: probabilities ``[B, K]`` of one head; half precision is converted to float32.
        second: probabilities ``[B, K]`` of the other; converted likewise.
        measure: ``"l1"``: the mean over classes of the absolute difference, at most ``2 / K``; ``"js"``: the
            Jensen-Shannon divergence, at most ``log 2``.

    Returns:
        ``[B]``, 0 where they are equal.

    Raises:
        ValueError: for different shapes, and for an unknown measure.
    """
    if measure not in get_args(Discrepancy):
        raise ValueError(
            f"measure must be one of {', '.join(get_args(Discrepancy))}, got {measure!r}: give one of them"
        )
    check_shapes(first=(first, "BK"), second=(second, "BK"))
    first, second = at_least_float32(first, second)
    if measure == "l1":
        return (first - second).abs().mean(1)
    mean = (first + second) / 2
    return sum(0.5 * (p * (p.log() - mean.log())).sum(1) for p in (first, second))  # type: ignore[return-value]


def dirichlet_mean(alpha: Tensor) -> Tensor:
    """The expected probabilities ``alpha / sum(alpha)``, of the shape of ``alpha``."""
    return alpha / alpha.sum(-1, keepdim=True)


def wide(values: Tensor) -> Tensor:
    """``values`` in float64; in float32 on MPS, which has no float64."""
    return values.float() if values.device.type == "mps" else values.double()
