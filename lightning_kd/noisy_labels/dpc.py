"""DPC: Dirichlet-based prediction calibration, and the large-margin split of the training set.

Chen-Chen Zong, Ye-Wen Wang, Ming-Kun Xie, Sheng-Jun Huang. Dirichlet-Based Prediction Calibration for Learning with
Noisy Labels. AAAI 2024, arXiv 2401.07062.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_kd.core.losses import at_least_float32, check_positive, check_target
from lightning_kd.core.mixture import Mixture
from lightning_kd.core.taps import penultimate_tap
from lightning_kd.noisy_labels._scores import clean_probability, logit_margin, split_scaled
from lightning_kd.noisy_labels.dividemix import DivideMix
from lightning_kd.noisy_labels.mixup import mix

__all__ = ["DPC", "calibrated_softmax", "clean_probability", "dirichlet_kl", "dirichlet_nll", "logit_margin"]

# From here on the series of the gamma functions is exact to 1e-11 (1e-6); below, cancellation costs less than that.
_SERIES_FROM = {torch.float64: 1000.0, torch.float32: 30.0}


def _log_alpha(logits: Tensor, gamma: float) -> Tensor:
    """``log(exp(logits) / gamma + 1)``, without overflow."""
    return torch.logaddexp(logits - math.log(gamma), logits.new_zeros(()))


def log_calibrated_softmax(logits: Tensor, gamma: float) -> Tensor:
    """The logarithm of ``calibrated_softmax``, computed without leaving log space."""
    check_positive(gamma=gamma)
    (logits,) = at_least_float32(logits)
    return _log_alpha(logits, gamma).log_softmax(1)


def calibrated_softmax(logits: Tensor, gamma: float) -> Tensor:
    """``(exp(logits) + gamma) / sum_c (exp(logits_c) + gamma)``: the mean of a Dirichlet distribution.

    Unlike softmax it depends on the level of the logits: where none gives evidence it is uniform.

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
        ``[B]``, one value a sample.

    Source: arXiv 2401.07062, evidential deep learning loss, first term.
    """
    check_target(logits, target)
    return -log_calibrated_softmax(logits, gamma).gather(1, target[:, None]).squeeze(1)


def dirichlet_kl(logits: Tensor, target: Tensor, gamma: float) -> Tensor:
    """Divergence of ``Dirichlet(exp(logits) / gamma + 1)``, the target's entry set to 1, from the uniform one.

    Never negative; 0 where the wrong classes have no evidence; no gradient at the target's logit. Computed in float64
    through log alpha, with the series of the gamma functions for large alpha: as written it is wrong in float32 for
    logits above 12 and not finite above 88. (On MPS, which has no float64, in float32: to 2e-5.)

    Args:
        logits: ``[B, C]``.
        target: int64 ``[B]``.
        gamma: positive.

    Returns:
        ``[B]``, float32 or float64; not yet weighted (the loss takes ``beta / C`` of it).

    Source: arXiv 2401.07062, evidential deep learning loss, second term.
    """
    check_positive(gamma=gamma)
    check_target(logits, target)
    (logits,) = at_least_float32(logits)
    classes = logits.shape[1]
    wide = logits if logits.device.type == "mps" else logits.double()  # no float64 there
    log_alpha = _log_alpha(wide, gamma).scatter(1, target[:, None], 0.0)
    log_total = log_alpha.logsumexp(1)
    divergence = _excess(log_alpha).sum(1) - _excess(log_total) + (classes - 1) * _digamma(log_total)
    return (divergence - math.lgamma(classes)).to(logits.dtype)


def _small(log_t: Tensor) -> tuple[Tensor, Tensor]:
    """Where the series is not used yet, and t there, capped elsewhere (an overflow would poison the gradient)."""
    small = log_t < math.log(_SERIES_FROM[log_t.dtype])
    return small, torch.where(small, log_t, 0.0).exp()


def _excess(log_t: Tensor) -> Tensor:
    """``(t - 1) digamma(t) - lgamma(t) - t``, which has no large parts that cancel."""
    small, t = _small(log_t)
    inverse = (-log_t).exp()
    series = -0.5 * log_t - 0.5 - 0.5 * math.log(2 * math.pi) + inverse / 3 + inverse**2 / 12
    return torch.where(small, (t - 1) * torch.digamma(t) - torch.lgamma(t) - t, series)


def _digamma(log_t: Tensor) -> Tensor:
    small, t = _small(log_t)
    inverse = (-log_t).exp()
    return torch.where(small, torch.digamma(t), log_t - inverse / 2 - inverse**2 / 12)


def evidence_mlp(features: int, hidden: int, num_classes: int) -> nn.Sequential:
    """The second head."""
    return nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Dropout(0.5), nn.Linear(hidden, num_classes))


class DPC(DivideMix):
    """DPC (Zong et al., AAAI 2024, arXiv 2401.07062), algorithm 1: calibrated outputs, and a split by logit margin.

    DivideMix's machinery with calibrated softmax, an evidential loss and a second head.
    The classifier of ``network`` is head 1: it learns from labels, guesses, splits and answers. Head 2, an MLP on the
    feature that enters the classifier, takes the unsupervised loss alone. Probabilities are the mean of both networks'
    calibrated softmax.

    Args:
        network: see ``TwoNetworkTask``; its classifier is its last ``nn.Linear``, or the one named.
        num_classes: see ``Task``.
        input_shape: see ``Task``.
        gamma: calibration constant. Default: 10 / C.
        beta: weight of the divergence in the evidential loss.
        split: ``"gmm"``: two Gaussians over the margins; ``"margin"``: the margins scaled to [0, 1] are the clean
            probabilities; ``"auto"``: Gaussians where the excess kurtosis of the margins is at most
            ``kurtosis_threshold``.
        kurtosis_threshold: see ``split``.
        strong_weight: weight of the consistency with two strongly augmented views (DPC*); 0 is without them.
        heads: 2, or 1 to let head 1 take the unsupervised loss too.
        head_width: hidden units of head 2.
        classifier: module path of the classifier.
        kwargs: of ``DivideMix``: ``warmup_epochs``, ``lambda_u``, ``ramp_epochs``, ``temperature``, ``threshold``,
            ``mixup_alpha``, ``confidence_penalty``, ``loss_history``, ``clip``; and those it takes.
    """

    keep_last_labelled = False

    def __init__(
        self,
        network: str | nn.Module,
        num_classes: int,
        input_shape: Sequence[int] = (3, 32, 32),
        gamma: float | None = None,
        beta: float = 0.5,
        split: Literal["gmm", "margin", "auto"] = "gmm",
        kurtosis_threshold: float = 1.2,
        strong_weight: float = 0.0,
        heads: int = 2,
        head_width: int = 1024,
        classifier: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(network, num_classes, input_shape, **kwargs)
        if split not in ("gmm", "margin", "auto"):
            raise ValueError(f"split must be 'gmm', 'margin' or 'auto', got {split!r}: give one of them")
        if strong_weight and len(self.input_shape) != 3:
            raise ValueError(
                f"strong_weight={strong_weight} needs images, got input_shape {self.input_shape}: set it to 0"
            )
        if heads not in (1, 2):
            raise ValueError(f"heads must be 1 or 2, got {heads}")
        for name, value in (("beta", beta), ("strong_weight", strong_weight)):
            if not value >= 0:
                raise ValueError(f"{name} must be 0 or more, got {value}")
        self.gamma = 10 / num_classes if gamma is None else gamma
        check_positive(gamma=self.gamma)
        self.beta = beta
        self.split_by = split
        self.kurtosis_threshold = kurtosis_threshold
        self.strong_weight = strong_weight
        self.views = ("weak", "weak", "strong", "strong") if strong_weight else ("weak", "weak")
        found = [penultimate_tap(network, classifier) for network in self.networks] if heads == 2 else []
        self._taps = [tap for tap, _ in found]
        self.heads = nn.ModuleList(evidence_mlp(layer.in_features, head_width, num_classes) for _, layer in found)

    def parts(self, k: int) -> list[nn.Module]:
        return [self.networks[k], *self.heads[k : k + 1]]

    def probabilities(self, logits: Tensor) -> Tensor:
        return calibrated_softmax(logits, self.gamma)

    def sample_scores(self, logits: Tensor, target: Tensor) -> Tensor:
        return logit_margin(logits, target)

    def split(self, scores: Tensor) -> tuple[Tensor, Mixture | None]:
        if self.split_by == "margin" or (self.split_by == "auto" and excess_kurtosis(scores) > self.kurtosis_threshold):
            return scores, None
        return split_scaled(scores)

    def warmup_terms(self, logits: Tensor, target: Tensor) -> dict[str, Tensor]:
        terms = {
            "nll": dirichlet_nll(logits, target, self.gamma).mean(),
            "kl": self.beta / self.num_classes * dirichlet_kl(logits, target, self.gamma).mean(),
        }
        if self.confidence_penalty:
            log_p = log_calibrated_softmax(logits, self.gamma)
            terms["confidence"] = (log_p.exp() * log_p).sum(1).mean()
        return terms

    def mixed_logits(self, k: int, image: Tensor, second: bool) -> tuple[Tensor, Tensor]:
        logits = self.logits_of(k, image)
        if not second or not self.heads:
            return logits, logits
        return logits, self.heads[k](self._taps[k].take()).to(logits.dtype)

    def supervised_terms(self, logits: Tensor, target: Tensor, partner: Tensor, weight: float) -> dict[str, Tensor]:
        ours, theirs = target.argmax(1), partner.argmax(1)
        nll, kl = (
            (weight * f(logits, ours, self.gamma) + (1 - weight) * f(logits, theirs, self.gamma)).mean()
            for f in (dirichlet_nll, dirichlet_kl)
        )
        return {"nll": nll, "kl": self.beta / self.num_classes * kl}

    def consistency_terms(
        self, k: int, logits: Tensor, images: Sequence[Tensor], partner: Tensor, share: float
    ) -> dict[str, Tensor]:
        if not self.strong_weight:
            return {}
        strong, _ = self.mixed_logits(k, mix(torch.cat(list(images)), partner, share), False)
        return {"strong": self.strong_weight * consistency_loss(strong, logits, self.gamma)}


def consistency_loss(logits: Tensor, reference: Tensor, gamma: float) -> Tensor:
    """Mean KL divergence from the calibrated output of ``reference``, without gradient, to that of ``logits``.

    Args:
        logits: of the strong views, ``[B, C]``.
        reference: of the weak views, ``[B, C]``; gets no gradient.
        gamma: positive.

    Returns:
        Scalar.

    Source: arXiv 2401.07062, DPC*.
    """
    expected = log_calibrated_softmax(reference.detach(), gamma)
    return (expected.exp() * (expected - log_calibrated_softmax(logits, gamma))).sum(1).mean()


def excess_kurtosis(values: Tensor) -> float:
    """Fourth central moment over the squared variance, minus 3; 0 for a Gaussian."""
    centred = values.double() - values.double().mean()
    variance = centred.square().mean()
    return float(centred.pow(4).mean() / variance.square() - 3) if variance > 0 else 0.0
