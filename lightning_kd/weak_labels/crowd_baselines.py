"""Crowd baselines: train on the majority vote, on the result of Dawid and Skene's EM, or in an EM with the network."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.annotations import majority_vote
from lightning_kd.core.batch import as_batch
from lightning_kd.core.losses import at_least_float32
from lightning_kd.weak_labels.crowd_statistics import DawidSkene, confusion_of, dawid_skene, posterior_of
from lightning_kd.weak_labels.crowd_task import FLOOR, CrowdTask

__all__ = ["AggregatedCrowd", "NetworkEM"]


class AggregatedCrowd(CrowdTask):
    """Crowd baseline: aggregate the annotations of each sample to one label first, then train on these labels.

    The label is the majority vote, or the most probable class by the EM of Dawid and Skene. Labels are computed once,
    before training. With few annotations and classes of unequal frequency EM can be worse than the vote, see
    ``dawid_skene``.

    Several processes: each computes the same labels.

    Args:
        network: see ``CrowdTask``.
        num_classes: see ``Task``.
        aggregation: ``"vote"`` or ``"dawid_skene"``.
        soft: train on the shares of the votes or on the posterior, instead of on the most probable class.
        iterations: number of EM iterations, see ``dawid_skene``.
        smoothing: pseudo-count, above 0, see ``dawid_skene``; also used for the confusion matrices of the vote.
        kwargs: ``input_shape``, ``weights`` of ``SupervisedTask``, and the arguments of ``FineTunedTask`` and ``Task``.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        network: str | nn.Module,
        num_classes: int,
        *,
        aggregation: Literal["vote", "dawid_skene"] = "vote",
        soft: bool = False,
        iterations: int = 50,
        smoothing: float = 0.01,
        **kwargs: Any,
    ) -> None:
        super().__init__(network, num_classes, **kwargs)
        if aggregation not in ("vote", "dawid_skene"):
            raise ValueError(f"aggregation must be 'vote' or 'dawid_skene', got {aggregation!r}: give one of them")
        check_numbers(least=0, whole=True, iterations=iterations)
        check_numbers(above=0, smoothing=smoothing)
        self.aggregation, self.soft = aggregation, soft
        self.iterations, self.smoothing = iterations, smoothing
        self._aggregated: DawidSkene | None = None
        self._train_target = torch.empty(0)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            index, given = torch.from_numpy(self.used_indices()), self.annotations
            if self.aggregation == "vote":
                vote = majority_vote(given[index], self.num_classes)
                self._aggregated = DawidSkene(vote, confusion_of(vote, given[index], self.smoothing))
            else:
                self._aggregated = dawid_skene(given[index], self.num_classes, self.iterations, self.smoothing)
            learnt = self._aggregated.posterior
            if not self.soft:
                learnt = F.one_hot(learnt.argmax(1), self.num_classes)
            self._train_target = torch.zeros(len(given), self.num_classes)
            self._train_target[index] = learnt.float()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch = as_batch(batch)
        (logits,) = at_least_float32(self(batch.image))
        self._train_target = self._train_target.to(logits.device)
        target = self._train_target[self.index_of(batch)].to(logits.dtype)
        return self.step_loss({"ce": F.cross_entropy(logits, target)}, logits, batch.target)

    def annotator_confusion(self) -> Tensor:
        assert self._aggregated is not None
        return self._aggregated.confusion

    def posterior(self) -> tuple[Tensor, Tensor]:
        assert self._aggregated is not None
        return torch.from_numpy(self.used_indices()), self._aggregated.posterior


class NetworkEM(CrowdTask):
    """EM over the true classes with the network as prior (as in AggNet, and a baseline of arXiv 1709.01779).

    The true class of each sample is treated as unknown. Every annotator has a confusion matrix: how probably they give
    each class to a sample of each true class. In each step (E) the posterior of the true class is proportional to the
    network's probability (at least 0.001) times the confusion entries of all annotations of the sample. The network is
    trained on this posterior, without gradient through it. At the end of each epoch (M) the confusion matrices are
    estimated from the posteriors of the epoch. They start near the identity.

    Checkpoints hold the confusion matrices and the posterior of every sample.

    Several processes: posteriors are exchanged at the end of an epoch, so that all have the same confusion matrices.

    Args:
        network: see ``CrowdTask``.
        num_classes: see ``Task``.
        smoothing: pseudo-count that is added to every count of the confusion matrices, above 0.
        kwargs: ``input_shape``, ``weights`` of ``SupervisedTask``, and the arguments of ``FineTunedTask`` and ``Task``.

    Raises:
        ValueError: if an argument is out of range.
    """

    confusions: Tensor

    def __init__(self, network: str | nn.Module, num_classes: int, *, smoothing: float = 0.01, **kwargs: Any) -> None:
        super().__init__(network, num_classes, **kwargs)
        check_numbers(above=0, smoothing=smoothing)
        self.smoothing = smoothing
        self.register_buffer("confusions", torch.empty(0, num_classes, num_classes, dtype=torch.float64))
        self.keep_precise("confusions")
        self.posteriors = self.add_sample_memory("posteriors", (num_classes,))

    def allocate(self, annotators: int) -> None:
        if len(self.confusions) != annotators:
            start = torch.eye(self.num_classes, dtype=torch.float64, device=self.confusions.device) + self.smoothing
            self.confusions = (start / start.sum(1, keepdim=True)).repeat(annotators, 1, 1)

    def annotators_in(self, state: dict[str, Tensor]) -> int:
        return len(state.get("confusions", ()))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch = as_batch(batch)
        annotations = self.annotations_of(batch)
        (logits,) = at_least_float32(self(batch.image))
        with torch.no_grad():
            log_prior = logits.softmax(1).clamp(min=FLOOR).log()
            posterior = posterior_of(log_prior, self.confusions, annotations)
            self.posteriors.write(self.index_of(batch), posterior)
        return self.step_loss({"em": F.cross_entropy(logits, posterior)}, logits, batch.target)

    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        index = torch.from_numpy(self.data.train_indices)
        seen = self.posteriors.rows[index.to(self.posteriors.rows.device)]
        self.confusions.copy_(confusion_of(seen, self.annotations[index].to(seen.device), self.smoothing))

    def annotator_confusion(self) -> Tensor:
        return self.confusions.double()
