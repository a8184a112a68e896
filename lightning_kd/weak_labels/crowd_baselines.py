"""Networks trained on the vote of annotations, on Dawid and Skene's classes, or in an EM with the network."""

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
    """Train on the majority, or on the classes that Dawid and Skene's EM finds in the annotations: the baselines.

    What is learnt is settled before the training. With few annotations of unequal classes the EM may well be worse than
    the vote, see ``dawid_skene``.

    Several processes: all settle the same.

    Args:
        network: see ``CrowdTask``.
        num_classes: see ``Task``.
        aggregation: ``"vote"`` or ``"dawid_skene"``.
        soft: learn shares or posteriors, in place of the likeliest class.
        iterations: of ``dawid_skene``.
        smoothing: see there; also of the confusions by the vote.
        kwargs: ``input_shape``, ``weights`` of ``SupervisedTask``, and the arguments of ``FineTunedTask`` and ``Task``.

    Raises:
        ValueError: for arguments out of range.
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
        self._settled: DawidSkene | None = None
        self._learnt = torch.empty(0)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            index, given = torch.from_numpy(self.used()), self.annotations
            if self.aggregation == "vote":
                vote = majority_vote(given[index], self.num_classes)
                self._settled = DawidSkene(vote, confusion_of(vote, given[index], self.smoothing))
            else:
                self._settled = dawid_skene(given[index], self.num_classes, self.iterations, self.smoothing)
            learnt = self._settled.posterior
            if not self.soft:
                learnt = F.one_hot(learnt.argmax(1), self.num_classes)
            self._learnt = torch.zeros(len(given), self.num_classes)
            self._learnt[index] = learnt.float()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch = as_batch(batch)
        (logits,) = at_least_float32(self(batch.image))
        self._learnt = self._learnt.to(logits.device)
        target = self._learnt[self.index_of(batch)].to(logits.dtype)
        return self.step_loss({"ce": F.cross_entropy(logits, target)}, logits, batch.target)

    def annotator_confusion(self) -> Tensor:
        assert self._settled is not None
        return self._settled.confusion

    def posterior(self) -> tuple[Tensor, Tensor]:
        assert self._settled is not None
        return torch.from_numpy(self.used()), self._settled.posterior


class NetworkEM(CrowdTask):
    """EM with the network as the prior of each sample (as in AggNet, and the baseline of arXiv 1709.01779).

    In each step the posterior of the true class of a sample is proportional to the network's probability (at least
    0.001) times the confusions of all its annotations, and the network learns that posterior, without gradient through
    it. At the end of an epoch the confusions are those counts that the posteriors of the epoch give. They start as
    identities.

    The confusions are a buffer, and the posteriors a memory of every sample, both in checkpoints. Several processes:
    posteriors are put together at the end of an epoch, so that all have the same confusions.

    Args:
        network: see ``CrowdTask``.
        num_classes: see ``Task``.
        smoothing: added to all counts, above 0.
        kwargs: ``input_shape``, ``weights`` of ``SupervisedTask``, and the arguments of ``FineTunedTask`` and ``Task``.

    Raises:
        ValueError: for arguments out of range.
    """

    confusions: Tensor

    def __init__(self, network: str | nn.Module, num_classes: int, *, smoothing: float = 0.01, **kwargs: Any) -> None:
        super().__init__(network, num_classes, **kwargs)
        check_numbers(above=0, smoothing=smoothing)
        self.smoothing = smoothing
        self.register_buffer("confusions", torch.empty(0, num_classes, num_classes, dtype=torch.float64))
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
