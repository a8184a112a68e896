"""Evidence for classes, and what it leaves open."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_kd.core.losses import at_least_float32, check_positive

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
    return wide(logits).clamp(-LOGIT_LIMIT, LOGIT_LIMIT).exp() / gamma + 1


def evidential_nll(logits: Tensor, target: Tensor, gamma: float = 1.0) -> Tensor:
    """``log(sum_c alpha_c) - log alpha_target``: minus the logarithm of the Dirichlet's mean for the target.

    Args:
        logits: ``[B, K]`` of one head, clamped to [-10, 10]; half precision is computed in float32 or wider.
        target: int64 ``[B]``, 0 to K-1.
        gamma: ``alpha = exp(logits) / gamma + 1``; above 0.

    Returns:
        ``[B]``, float32 or float64.

    Source: evidential loss as in DPC, arXiv 2401.07062.
    """
    alpha = evidence_alpha(logits, gamma)
    value = alpha.sum(1).log() - alpha.gather(1, target[:, None]).squeeze(1).log()
    return value.to(at_least_float32(logits)[0].dtype)


def evidential_kl(logits: Tensor, target: Tensor | None, gamma: float = 1.0) -> Tensor:
    """Divergence of the Dirichlet distribution from the uniform one, the target's evidence left out.

    Never negative; 0 where no other class has evidence; no gradient at the target's logit. Computed in float64.

    Args:
        logits: ``[B, K]`` of one head, clamped to [-10, 10].
        target: int64 ``[B]``, 0 to K-1; ``None`` leaves no class out, for samples of none of them.
        gamma: ``alpha = exp(logits) / gamma + 1``; above 0.

    Returns:
        ``[B]``, float32 or float64; not yet divided by K.

    Source: Sensoy et al., arXiv 1806.01768; weighted as in arXiv 2401.07062.
    """
    alpha = evidence_alpha(logits, gamma)
    if target is not None:
        alpha = alpha.scatter(1, target[:, None], 1.0)
    strength = alpha.sum(1)
    value = (
        torch.lgamma(strength)
        - torch.lgamma(strength.new_tensor(float(alpha.shape[1])))
        - torch.lgamma(alpha).sum(1)
        + ((alpha - 1) * (torch.digamma(alpha) - torch.digamma(strength)[:, None])).sum(1)
    )
    return value.to(at_least_float32(logits)[0].dtype)


def head_discrepancy(first: Tensor, second: Tensor, measure: Discrepancy = "l1") -> Tensor:
    """How far two heads' predictions are apart.

    Args:
        first: probabilities ``[B, K]``.
        second: likewise.
        measure: ``"l1"``: the mean over classes of the absolute difference, at most ``2 / K``; ``"js"``: the
            Jensen-Shannon divergence, at most ``log 2``.

    Returns:
        ``[B]``, 0 where they are equal.
    """
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
