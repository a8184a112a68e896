"""DPC: calibrated predictions by a Dirichlet model, and a split of the training set by logit margin.

Chen-Chen Zong, Ye-Wen Wang, Ming-Kun Xie, Sheng-Jun Huang. Dirichlet-Based Prediction Calibration for Learning with
Noisy Labels. AAAI 2024, arXiv 2401.07062.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.dirichlet import calibrated_softmax, dirichlet_kl, dirichlet_nll, log_calibrated_softmax
from lightning_kd.core.feature_hooks import penultimate_tap
from lightning_kd.core.losses import at_least_float32, check_shapes
from lightning_kd.core.mixing import mix
from lightning_kd.core.mixture import Mixture
from lightning_kd.core.outputs import class_logits
from lightning_kd.core.phased_loader import PhaseBatch
from lightning_kd.noisy_labels.dividemix import DivideMix
from lightning_kd.noisy_labels.label_scores import clean_probability, logit_margin, split_scaled

__all__ = ["DPC", "calibrated_softmax", "clean_probability", "dirichlet_kl", "dirichlet_nll", "logit_margin"]


def evidence_mlp(features: int, hidden: int, num_classes: int) -> nn.Sequential:
    """The second head: an MLP from features ``[B, features]`` to logits ``[B, num_classes]``."""
    return nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Dropout(0.5), nn.Linear(hidden, num_classes))


class DPC(DivideMix):
    """DPC (Zong et al., AAAI 2024, arXiv 2401.07062), algorithm 1: calibrated predictions, split by logit margin.

    The method improves DivideMix, which splits the labels into clean and wrong ones and trains on the latter as
    unlabelled. A network that has learnt wrong labels is overconfident, so the softmax is replaced by a calibrated one
    with an evidential (Dirichlet) loss. Labels are split by the margin of their logit over the largest other logit,
    instead of by their loss.

    Each network has two heads. Head 1, the classifier of ``network``, learns from labels, guesses labels, computes the
    margins and makes the predictions. Head 2, an MLP on the input feature of the classifier, is trained only with the
    unsupervised loss. Probabilities are the mean of both networks' calibrated softmax outputs.

    Args:
        network: see ``TwoNetworkTask``; its classifier is the last ``nn.Linear``, or ``classifier``.
        num_classes: see ``Task``.
        input_shape: see ``Task``.
        gamma: constant of the calibrated softmax, above 0. Default: ``10 / num_classes``.
        beta: weight of the KL divergence in the evidential loss.
        split: how clean probabilities are computed. ``"gmm"``: with two Gaussians fitted to the margins; ``"margin"``:
            the margins scaled to [0, 1]; ``"auto"``: with Gaussians if the excess kurtosis of the margins is at most
            ``kurtosis_threshold``, else the scaled margins.
        kurtosis_threshold: see ``split``.
        strong_weight: weight of the consistency with two strongly augmented views (DPC*); 0 uses none.
        heads: 2, or 1 to train head 1 with the unsupervised loss too. While that loss has weight 0, weight decay and
            momentum still change head 2, as in the official code.
        head_width: number of hidden units of head 2.
        classifier: module path of the classifier. Default: the last ``nn.Linear``.
        drop_last: drop the last batch of a stream if it is smaller than the others; ``False`` on WebVision.
        partner_at_epoch_start: let network 1 guess labels for network 2 with its weights from before the epoch, as on
            WebVision, where both are trained at once. Default: with those after its own pass.
        kwargs: ``warmup_epochs``, ``lambda_u``, ``ramp_epochs``, ``temperature``, ``threshold``, ``mixup_alpha``,
            ``confidence_penalty``, ``loss_history``, ``clip`` of ``DivideMix``, and the further arguments it takes.

    Raises:
        ValueError: if an argument is out of range, or ``strong_weight`` is set for samples that are no images.
    """

    def __init__(
        self,
        network: str | nn.Module,
        num_classes: int,
        *,
        input_shape: Sequence[int] = (3, 32, 32),
        gamma: float | None = None,
        beta: float = 0.5,
        split: Literal["gmm", "margin", "auto"] = "gmm",
        kurtosis_threshold: float = 1.2,
        strong_weight: float = 0.0,
        heads: int = 2,
        head_width: int = 1024,
        classifier: str | None = None,
        drop_last: bool = True,
        partner_at_epoch_start: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(network, num_classes, input_shape=input_shape, **kwargs)
        check_numbers(least=0, beta=beta, strong_weight=strong_weight)
        check_numbers(above=0, optional=True, gamma=gamma)
        check_numbers(kurtosis_threshold=kurtosis_threshold)
        check_numbers(least=1, whole=True, heads=heads, head_width=head_width)
        if split not in ("gmm", "margin", "auto"):
            raise ValueError(f"split must be 'gmm', 'margin' or 'auto', got {split!r}: give one of them")
        if strong_weight and len(self.input_shape) != 3:
            raise ValueError(
                f"strong_weight={strong_weight} needs images, got input_shape {self.input_shape}: set it to 0"
            )
        if heads not in (1, 2):
            raise ValueError(f"heads must be 1 or 2, got {heads}")
        self.gamma = 10 / num_classes if gamma is None else gamma
        self.beta = beta
        self.split_by = split
        self.kurtosis_threshold = kurtosis_threshold
        self.strong_weight = strong_weight
        self.drop_last = drop_last
        self.partner_at_epoch_start = partner_at_epoch_start
        self._earlier: list[nn.Module] = []  # network 1 before the epoch; in a list, so that no checkpoint has it
        self._semi_supervised = False
        self.views = ("weak", "weak", "strong", "strong") if strong_weight else ("weak", "weak")
        found = [penultimate_tap(network, classifier) for network in self.networks] if heads == 2 else []
        self._taps = [tap for tap, _ in found]
        self.heads = nn.ModuleList(evidence_mlp(layer.in_features, head_width, num_classes) for _, layer in found)

    def parts(self, k: int) -> list[nn.Module]:
        return [self.networks[k], *self.heads[k : k + 1]]

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        if self.partner_at_epoch_start and self.current_epoch >= self.warmup_epochs:
            self._earlier = [copy.deepcopy(self.networks[0]).eval().requires_grad_(False)]

    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        self._earlier = []

    def partner_logits(self, k: int, image: Tensor) -> Tensor:
        if k == 0 or not self._earlier:
            return super().partner_logits(k, image)
        (logits,) = at_least_float32(
            class_logits(self._earlier[0], self._earlier[0](self.format_image(image)), self.num_classes)
        )
        return logits

    def network_step(self, k: int, batch: PhaseBatch) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        self._semi_supervised = batch.unlabelled is not None
        return super().network_step(k, batch)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self._semi_supervised:  # a head whose loss has weight 0 must get a gradient of 0, not None
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is None:
                        parameter.grad = torch.zeros_like(parameter)
        super().on_before_optimizer_step(optimizer)

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
        return logits, self.heads[k](self._taps[k].pop()).to(logits.dtype)

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
    """Mean KL divergence from the calibrated softmax of ``reference`` to that of ``logits``.

    Args:
        logits: ``[B, C]``, logits of the strong views.
        reference: ``[B, C]``, logits of the weak views; gets no gradient.
        gamma: constant of the calibrated softmax, above 0.

    Returns:
        Scalar.

    Source: arXiv 2401.07062, DPC*.
    """
    check_shapes(logits=(logits, "BC"), reference=(reference, "BC"))
    expected = log_calibrated_softmax(reference.detach(), gamma)
    return (expected.exp() * (expected - log_calibrated_softmax(logits, gamma))).sum(1).mean()


def excess_kurtosis(values: Tensor) -> float:
    """Fourth central moment divided by the squared variance, minus 3: 0 for a Gaussian."""
    centred = values.double() - values.double().mean()
    variance = centred.square().mean()
    return float(centred.pow(4).mean() / variance.square() - 3) if variance > 0 else 0.0
