"""Logits as evidence: parameters ``alpha = exp(logits) / gamma + 1`` of a Dirichlet distribution over the classes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_kd.core.losses import at_least_float32, check_positive, check_shapes, check_target

# above this the series of the gamma functions is exact to 1e-11 (1e-6); below it, so are the functions themselves
_SERIES_FROM = {torch.float64: 1000.0, torch.float32: 30.0}


def _log_alpha(logits: Tensor, gamma: float) -> Tensor:
    """``log(exp(logits) / gamma + 1)``, without overflow."""
    return torch.logaddexp(logits - math.log(gamma), logits.new_zeros(()))


def log_calibrated_softmax(logits: Tensor, gamma: float) -> Tensor:
    """The logarithm of ``calibrated_softmax``, ``[B, C]``, computed from the logits without overflow."""
    check_positive(gamma=gamma)
    check_shapes(logits=(logits, "BC"))
    (logits,) = at_least_float32(logits)
    return _log_alpha(logits, gamma).log_softmax(1)


def calibrated_softmax(logits: Tensor, gamma: float) -> Tensor:
    """``(exp(logits) + gamma) / sum_c (exp(logits_c) + gamma)``: the mean of a Dirichlet distribution.

    Unlike softmax, adding a constant to all logits changes it: if all logits are very negative, it is uniform.

    Args:
        logits: ``[B, C]``; half precision is computed in float32, float64 stays.
        gamma: positive; the paper takes 10 / C. Towards 0 it becomes softmax.

    Returns:
        ``[B, C]``, float32 or float64.

    Source: arXiv 2401.07062, calibrated softmax function.
    """
    return log_calibrated_softmax(logits, gamma).exp()


def dirichlet_nll(logits: Tensor, target: Tensor, gamma: float) -> Tensor:
    """``-log calibrated_softmax(logits, gamma)`` of the target.

    Args:
        logits: ``[B, C]``; half precision is computed in float32, float64 stays.
        target: int64 ``[B]``.
        gamma: positive.

    Returns:
        ``[B]``, one value for each sample.

    Source: arXiv 2401.07062, evidential deep learning loss, first term.
    """
    check_target(logits, target)
    return -log_calibrated_softmax(logits, gamma).gather(1, target[:, None]).squeeze(1)


def dirichlet_kl(logits: Tensor, target: Tensor | None, gamma: float) -> Tensor:
    """KL divergence of ``Dirichlet(alpha)``, with the target's entry of alpha set to 1, from the uniform Dirichlet.

    ``alpha = exp(logits) / gamma + 1``. It punishes evidence for wrong classes: never negative, 0 if they have no
    evidence, no gradient at the target's logit. It is computed in float64 from log alpha, with the series of the gamma
    functions for large alpha, since the plain formula is wrong in float32 for logits above 12 and not finite above 88.
    (On MPS, which has no float64, it is computed in float32 and is exact to 2e-5.)

    Args:
        logits: ``[B, C]``.
        target: int64 ``[B]``; ``None``: no entry is set to 1.
        gamma: positive.

    Returns:
        ``[B]``, float32 or float64; not weighted (the loss takes ``beta / C`` of it).

    Source: arXiv 2401.07062, evidential deep learning loss, second term.
    """
    check_positive(gamma=gamma)
    if target is not None:
        check_target(logits, target)
    check_shapes(logits=(logits, "BC"))
    (logits,) = at_least_float32(logits)
    classes = logits.shape[1]
    wide = logits if logits.device.type == "mps" else logits.double()  # no float64 there
    log_alpha = _log_alpha(wide, gamma)
    if target is not None:
        log_alpha = log_alpha.scatter(1, target[:, None], 0.0)
    log_total = log_alpha.logsumexp(1)
    divergence = _excess(log_alpha).sum(1) - _excess(log_total) + (classes - 1) * _digamma(log_total)
    return (divergence - math.lgamma(classes)).to(logits.dtype)


def _small(log_t: Tensor) -> tuple[Tensor, Tensor]:
    """A mask of where the series is not used, and ``t`` there; 1 elsewhere, since overflow would make gradients NaN."""
    small = log_t < math.log(_SERIES_FROM[log_t.dtype])
    return small, torch.where(small, log_t, 0.0).exp()


def _excess(log_t: Tensor) -> Tensor:
    """``(t - 1) digamma(t) - lgamma(t) - t``, computed so that no large terms cancel."""
    small, t = _small(log_t)
    inverse = (-log_t).exp()
    series = -0.5 * log_t - 0.5 - 0.5 * math.log(2 * math.pi) + inverse / 3 + inverse**2 / 12
    return torch.where(small, (t - 1) * torch.digamma(t) - torch.lgamma(t) - t, series)


def _digamma(log_t: Tensor) -> Tensor:
    small, t = _small(log_t)
    inverse = (-log_t).exp()
    return torch.where(small, torch.digamma(t), log_t - inverse / 2 - inverse**2 / 12)
