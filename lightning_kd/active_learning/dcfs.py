"""DCFS: a query in two steps, by evidential uncertainties and by the discrepancy of two heads.

Ye-Wen Wang, Chen-Chen Zong, Ming-Kun Xie, Sheng-Jun Huang. Dirichlet-Based Coarse-to-Fine Example Selection For
Open-Set Annotation. 2024, arXiv 2409.17607. Equations, settings and code were not available: ``DCFS`` says which parts
are a reconstruction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from lightning_kd.active_learning.dcfs_selection import Coarse, coarse_to_fine, uncertainty_score
from lightning_kd.active_learning.evidential_uncertainty import (
    DirichletUncertainties,
    Discrepancy,
    dirichlet_mean,
    dirichlet_uncertainties,
    evidence_alpha,
    evidential_kl,
    evidential_nll,
    head_discrepancy,
    wide,
)
from lightning_kd.active_learning.pool_task import PoolTask
from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.batch import as_batch
from lightning_kd.core.distributed import process_count, summed
from lightning_kd.core.feature_hooks import penultimate_tap
from lightning_kd.core.fine_tuning import FineTunedTask
from lightning_kd.core.losses import at_least_float32, check_shapes, check_target
from lightning_kd.core.outputs import class_logits
from lightning_kd.pool import PoolView, Query

__all__ = [
    "DCFS",
    "DirichletUncertainties",
    "coarse_to_fine",
    "dirichlet_uncertainties",
    "discrepancy_loss",
    "evidential_kl",
    "evidential_nll",
    "head_discrepancy",
]

Fine = Literal["discrepancy", "total", "none"]
Outputs = Literal["K", "K+1"]


def discrepancy_loss(
    first_logits: Tensor, second_logits: Tensor, target: Tensor, gamma: float = 1.0, measure: Discrepancy = "l1"
) -> Tensor:
    """The mean discrepancy of two heads over known samples minus the mean over unknown samples.

    Args:
        first_logits: ``[B, K]`` of one head.
        second_logits: ``[B, K]`` of the other head.
        target: int64 ``[B]``: 0 to K-1, or K for unknown samples. Without samples of one kind its mean counts as 0.
        gamma: see ``evidential_nll``.
        measure: see ``head_discrepancy``.

    Returns:
        Scalar; logits out of [-10, 10] get no gradient.

    Raises:
        ValueError: for shapes that do not fit, a target that is not int64, or (checked on a CPU alone) out of range.

    Source: arXiv 2409.17607, abstract; a reconstruction.
    """
    check_shapes(first_logits=(first_logits, "BK"), second_logits=(second_logits, "BK"))
    check_target(first_logits, target, num_classes=first_logits.shape[1] + 1)
    first, second = (dirichlet_mean(evidence_alpha(logits, gamma)) for logits in (first_logits, second_logits))
    is_known = target < first.shape[1]
    known, unknown = _shares(is_known, ~is_known)
    value = (head_discrepancy(first, second, measure) * (known - unknown)).sum()
    return value.to(at_least_float32(first_logits)[0].dtype)


def _shares(*parts: Tensor) -> Tensor:
    """Weights ``[parts, B]``: a sum weighted by row ``i`` is a mean over the samples in ``parts[i]``, bool ``[B]``.

    The mean is over the samples of all processes; the weights allow for DDP, which averages gradients over processes.
    """
    masks = torch.stack(parts)
    count = summed(masks.sum(1))
    return wide(masks) * process_count() / count.clamp(min=1)[:, None]


class DCFS(PoolTask, FineTunedTask):
    """DCFS (Wang et al., 2024, arXiv 2409.17607), reconstructed: what looks known, then where two heads differ.

    The network has two evidential heads. They are trained to agree on known samples and to disagree on unknown ones.
    A query has two steps: keep the samples with little uncertainty, which are probably of known classes, and of these
    take the ones on which the two heads disagree most.

    Both heads are linear layers on the input of the network's classifier; the classifier is the first head. A head's
    logits give the Dirichlet parameters ``alpha = exp(logits) / gamma + 1``. The loss of known samples is the
    evidential loss of both heads (negative log-likelihood and divergence) plus ``discrepancy_weight`` times the
    discrepancy of the heads; that of unknown samples is ``-discrepancy_weight`` times their discrepancy. The query
    keeps the ``coarse_factor * budget`` samples with the smallest sum of data and distribution uncertainty, and takes
    the ``budget`` largest discrepancies among them. Predictions are the mean of both heads' expected probabilities,
    whose logarithm ``forward`` returns.

    **What is from the paper.** From the abstract: evidence in place of softmax, data and distribution uncertainty
    together, two heads whose discrepancy is increased for unknown and reduced for known classes, a coarse and then a
    fine selection. The formulas of the uncertainties and of the evidential loss are the published ones. The rest is a
    reconstruction from related work: the number of outputs of a head, the form and weight of the discrepancy, the
    coarse and the fine score, ``coarse_factor``, the weight and annealing of the divergence, and the average over the
    heads. Results of this class are not results of the paper.

    ``train/acc`` counts known samples alone. Several processes: each mean is over the known, or the unknown, samples of
    the joint batch.

    Args:
        network: a network's name (``lightning-kd list``), or an ``nn.Module`` with ``K`` logits, or with one more, see
            ``num_outputs``.
        num_classes: number of known classes ``K``. From the command line it comes from the data module.
        input_shape: see ``Task``.
        weights: checkpoint or ``state_dict`` file to start from; ``"default"`` for the published weights of a ``timm/``
            or ``torchvision/`` network. Default: train from scratch.
        gamma: divides the evidence, see above. (DPC's code uses 10 / K.)
        kl_weight: weight of the divergence, which is divided by K.
        annealing_epochs: epochs in which that weight rises linearly from 0; 0: the full weight from the start.
        discrepancy_weight: weight of the mean discrepancy of known samples minus that of unknown samples.
        discrepancy: ``"l1"`` or ``"js"``, see ``head_discrepancy``.
        unknown_evidence_weight: weight of the divergence, divided by K, of unknown samples, which teaches the heads to
            give no evidence for them. Only with ``num_outputs="K"``.
        num_outputs: ``"K"``, or ``"K+1"`` for heads with a further, last output for unknown classes. Unknown samples
            then have the evidential loss too, with target K; its means are over all samples and its divergence is
            divided by K + 1. Uncertainties and discrepancy are over all outputs; predictions are normalised over the
            known classes.
        coarse_score: ``"sum"``: both uncertainties, each scaled to [0, 1] over the pool; ``"mixture"``: the product of
            the posteriors of the lower of two Gaussians, fitted to each uncertainty; ``"data"`` or ``"distribution"``
            alone; ``"none"``: no coarse step.
        coarse_factor: the coarse step keeps this times the budget; at least 1.
        fine_score: ``"discrepancy"``; ``"total"``, the entropy of the expected probabilities; or ``"none"``: the
            smallest coarse score.
        classifier: module path of the network's classifier. Default: the last ``nn.Linear``.
        kwargs: ``new_classifier``, ``freeze``, ``backbone_lr`` of ``FineTunedTask``; ``warm_start`` of ``PoolTask``;
            ``optimizer`` (default: that of ``Task``, with weights that of ``optimizer_for``), ``lr_scheduler``,
            ``lr_interval``, ``channels_last``, ``compile`` of ``Task``.

    Raises:
        ValueError: for an argument out of range.
    """

    plain_default = True

    def __init__(
        self,
        network: str | nn.Module,
        num_classes: int,
        *,
        input_shape: Sequence[int] = (3, 32, 32),
        weights: str | None = None,
        gamma: float = 1.0,
        kl_weight: float = 1.0,
        annealing_epochs: int = 10,
        discrepancy_weight: float = 1.0,
        discrepancy: Discrepancy = "l1",
        unknown_evidence_weight: float = 0.0,
        num_outputs: Outputs = "K",
        coarse_score: Coarse = "sum",
        coarse_factor: float = 3.0,
        fine_score: Fine = "discrepancy",
        classifier: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_classes, input_shape=input_shape, **kwargs)
        check_numbers(above=0, gamma=gamma)
        check_numbers(least=0, kl_weight=kl_weight, discrepancy_weight=discrepancy_weight)
        check_numbers(least=0, unknown_evidence_weight=unknown_evidence_weight)
        check_numbers(least=0, whole=True, annealing_epochs=annealing_epochs)
        check_numbers(least=1, remedy="it multiplies the budget", coarse_factor=coarse_factor)
        choices: dict[str, tuple[str, Any]] = {
            "discrepancy": (discrepancy, Discrepancy),
            "coarse_score": (coarse_score, Coarse),
            "fine_score": (fine_score, Fine),
            "num_outputs": (num_outputs, Outputs),
        }
        for name, (choice, known) in choices.items():
            if choice not in get_args(known):
                raise ValueError(f"{name} must be one of {list(get_args(known))}, got {choice!r}")
        if coarse_score == fine_score == "none":
            raise ValueError("coarse_score and fine_score must not both be 'none': give one of them")
        if num_outputs == "K+1" and unknown_evidence_weight:
            raise ValueError(
                f"unknown_evidence_weight must be 0 with num_outputs='K+1', got {unknown_evidence_weight}: unknown "
                "samples have an output of their own there"
            )
        self.gamma = gamma
        self.kl_weight = kl_weight
        self.annealing_epochs = annealing_epochs
        self.discrepancy_weight = discrepancy_weight
        self.discrepancy: Discrepancy = discrepancy
        self.unknown_evidence_weight = unknown_evidence_weight
        self.coarse_score: Coarse = coarse_score
        self.coarse_factor = coarse_factor
        self.fine_score: Fine = fine_score
        self.outputs = num_classes + (num_outputs == "K+1")
        self.network = self.build_to_train(network, weights, outputs=self.outputs)
        self._feature, layer = penultimate_tap(self.network, classifier)
        self.second_head = nn.Linear(layer.in_features, self.outputs)

    @property
    def main_network(self) -> nn.Module:
        return self.network

    def exports(self) -> dict[str, nn.Module]:
        """``network``, whose logits are those of the first head alone, and ``second_head``, the linear layer."""
        return {"network": self.network, "second_head": self.second_head}

    def heads(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """The logits of both heads, ``[B, K]`` or ``[B, K+1]`` each, float32 or wider."""
        first = class_logits(self.network, self.network(self.format_image(image)), self.outputs)
        second = self.second_head(self._feature.pop())
        return at_least_float32(first, second)  # type: ignore[return-value]

    def forward(self, image: Tensor) -> Tensor:
        """The logarithm ``[B, K]`` of the mean of both heads' expected probabilities of known classes."""
        return self._log_mean(*self.heads(image))

    def _log_mean(self, first: Tensor, second: Tensor) -> Tensor:
        one, other = (dirichlet_mean(evidence_alpha(logits, self.gamma)) for logits in (first, second))
        mean = (one + other)[:, : self.num_classes]
        return (mean / mean.sum(1, keepdim=True)).log().to(first.dtype)

    # -- training ----------------------------------------------------------------------------------------------------

    def train_loader(self, data: Any) -> Any:
        data = self.pool
        answered = np.sort(np.concatenate([data.known_indices, data.unknown_indices]))
        overfit = self.trainer.overfit_batches > 0  # type: ignore[attr-defined]
        return data.loader("train", answered, shuffle=not overfit, augment=True, batch_size=data.batch_size)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch = as_batch(batch)
        heads = self.heads(batch.image)
        is_known = batch.target < self.num_classes
        known, unknown, learnt = _shares(is_known, ~is_known, batch.target < self.outputs)
        target = batch.target.clamp(max=self.outputs - 1)  # clamped targets have the weight 0 in learnt
        first, second = (dirichlet_mean(evidence_alpha(logits, self.gamma)) for logits in heads)
        apart = head_discrepancy(first, second, self.discrepancy)
        rise = min(1.0, self.current_epoch / self.annealing_epochs) if self.annealing_epochs else 1.0
        nll = sum((learnt * evidential_nll(logits, target, self.gamma)).sum() for logits in heads)
        kl = sum((learnt * evidential_kl(logits, target, self.gamma)).sum() for logits in heads)
        terms = {
            "nll": nll,
            "kl": self.kl_weight * rise / self.outputs * kl,
            "discrepancy": self.discrepancy_weight * (apart * (known - unknown)).sum(),
        }
        if self.unknown_evidence_weight:
            evidence = sum((unknown * evidential_kl(logits, None, self.gamma)).sum() for logits in heads)
            terms["evidence"] = self.unknown_evidence_weight / self.num_classes * evidence
        logits = (first + second)[:, : self.num_classes]
        return self.step_loss(terms, logits, batch.target, counted=is_known)  # type: ignore[arg-type]

    # -- scoring and choosing ----------------------------------------------------------------------------------------

    def pool_scores(self, image: Tensor, index: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """``total``, ``data`` and ``distribution`` uncertainty, averaged over the heads, and the heads'
        ``discrepancy``; float64 ``[B]`` each."""
        heads = self.heads(image)
        alphas = [evidence_alpha(logits, self.gamma) for logits in heads]
        first, second = (dirichlet_uncertainties(alpha) for alpha in alphas)
        scores = {
            name: (getattr(first, name) + getattr(second, name)) / 2 for name in ("total", "data", "distribution")
        }
        scores["discrepancy"] = head_discrepancy(dirichlet_mean(alphas[0]), dirichlet_mean(alphas[1]), self.discrepancy)
        return self._log_mean(*heads).float().softmax(1), scores

    def select(
        self, scores: Mapping[str, Tensor], pool: PoolView, budget: int, generator: np.random.Generator
    ) -> Query:
        coarse = uncertainty_score(scores["data"], scores["distribution"], self.coarse_score)
        fine = -coarse if self.fine_score == "none" else scores[self.fine_score].double()
        factor = np.inf if self.coarse_score == "none" else self.coarse_factor
        position = coarse_to_fine(coarse, fine, budget, factor).numpy()
        return Query(pool.unlabelled[position], fine.numpy()[position])
