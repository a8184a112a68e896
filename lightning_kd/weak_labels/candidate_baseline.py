"""Simple baselines for learning from candidate labels."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.batch import Batch
from lightning_kd.core.two_pass_step import second_pass
from lightning_kd.weak_labels.candidate_task import CandidateTask, MetaBatch
from lightning_kd.weak_labels.candidate_weights import (
    candidate_likelihood_loss,
    likely_weights,
    uniform_weights,
    weighted_candidate_loss,
)

__all__ = ["CandidateBaseline"]

RULES = ("uniform", "proden", "rc", "cc", "meta", "oracle")


class CandidateBaseline(CandidateTask):
    """Partial-label baselines: train a network on candidate labels by a simple rule.

    Each sample comes with several candidate labels, of which one is true. Most rules give every candidate a weight and
    minimise the weighted cross-entropy (``weighted_candidate_loss``). Metrics and the report are those of
    ``CandidateTask``.

    Several processes: gradients are averaged and the remembered weights exchanged at the end of each epoch; nothing
    else is shared.

    Args:
        network: see ``CandidateTask``.
        num_classes: see ``Task``.
        rule: how to learn from the candidates. ``"uniform"``: equal weights; ``"proden"`` (Lv et al., ICML 2020, arXiv
            2002.08053): weights proportional to the probabilities of the candidates when the sample was last trained
            on; ``"rc"`` (Feng et al., NeurIPS 2020, arXiv 2007.08929): the same, with probabilities from the network
            after that step; ``"cc"`` (same paper): maximise the probability that the class is one of the candidates;
            ``"meta"``: ignore the candidates and train on the small meta set with true labels, for as many steps;
            ``"oracle"``: train on the true labels.
        meta_batch_size: batch size of ``"meta"``, at most the size of the meta set.
        kwargs: ``input_shape``, ``weights`` of ``SupervisedTask``, and the arguments of ``FineTunedTask`` and ``Task``.

    Raises:
        ValueError: if an argument is out of range; in a fit, if the data has no candidates or, for ``"meta"``, no meta
            set.
    """

    def __init__(
        self,
        network: str | nn.Module,
        num_classes: int,
        *,
        rule: Literal["uniform", "proden", "rc", "cc", "meta", "oracle"] = "proden",
        meta_batch_size: int = 64,
        **kwargs: Any,
    ) -> None:
        if rule not in RULES:
            raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}: give one of them")
        check_numbers(least=1, whole=True, meta_batch_size=meta_batch_size)
        self.remembers_weights, self.needs_meta_set = rule in ("proden", "rc"), rule == "meta"
        super().__init__(network, num_classes, **kwargs)
        self.rule, self.meta_batch_size = rule, meta_batch_size

    def train_loader(self, data: Any) -> Any:
        return self.meta_loader(data, self.meta_batch_size) if self.rule == "meta" else super().train_loader(data)

    def training_target(self, batch: Any) -> Tensor | None:
        return super().training_target(batch.meta if isinstance(batch, MetaBatch) else batch)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch = batch.meta if isinstance(batch, MetaBatch) else batch
        logits = self.training_logits(batch.image)
        if self.rule in ("meta", "oracle"):
            return self.step_loss({"loss": F.cross_entropy(logits, batch.target)}, logits, batch.target)
        candidates = self.candidates_of(batch)
        likely = likely_weights(logits, candidates)
        if self.rule == "cc":
            weights, loss = likely, candidate_likelihood_loss(logits, candidates)
        else:
            weights = self.weights_of(batch)
            loss = weighted_candidate_loss(logits, weights)
        if self.rule == "proden" and self.stored is not None:
            self.stored.write(self.index_of(batch), likely)
        self.log_true_weight(weights, batch.target)
        return self.step_loss({"loss": loss}, logits, batch.target)

    def weights_of(self, batch: Batch) -> Tensor:
        """The weights ``[B, K]`` for a batch, computed once per step.

        Optimizers that evaluate a batch twice, such as SAM, get the same weights both times.
        """
        if not second_pass():
            remembered = self.stored is not None
            self._weights = self.stored_weights(batch) if remembered else uniform_weights(self.candidates_of(batch))
        return self._weights

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(outputs, batch, batch_idx)
        if self.rule == "rc" and self.stored is not None:
            with torch.no_grad(), self.stateless_forward() as forward:
                likely = likely_weights(forward({}, batch.image), self.candidates_of(batch))
            self.stored.write(self.index_of(batch), likely)
