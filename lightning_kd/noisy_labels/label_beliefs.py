"""How much BLDR's negative head believes the given labels: noted batch by batch, and the verdict by it."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_kd.core.batch import Batch
from lightning_kd.core.distributed import gather_by_index
from lightning_kd.core.two_pass_step import second_pass
from lightning_kd.noisy_labels.bldr_terms import log_mean
from lightning_kd.noisy_labels.label_scores import LabelScores, logit_margin


class EpochBeliefs:
    """What was believed of the given labels in the steps of an epoch."""

    def __init__(self) -> None:
        self._batches: list[tuple[Tensor, ...]] = []

    def clear(self) -> None:
        """Forget all."""
        self._batches.clear()

    @torch.no_grad()
    def record_batch(self, batch: Batch, index: Tensor, positive: Tensor, negative: Tensor) -> None:
        """Keep what the negative head says of the labels of a batch.

        Nothing is kept in the second evaluation of a batch by an optimizer such as SAM.

        Args:
            batch: whose targets are judged.
            index: int64 ``[B]``, of its samples.
            positive: ``[B, C]``, logits of the positive head; with those of the other the answer.
            negative: ``[B, C]``, logits of the negative head.
        """
        if second_pass():
            return
        target = batch.target
        clean = batch.extras.get("clean_target", torch.full_like(target, -1))
        scores = log_mean(positive, negative)
        believed = negative.softmax(1).gather(1, target[:, None]).squeeze(1)
        margin, predicted = logit_margin(scores, target), scores.argmax(1)
        self._batches.append((index, target, clean, believed, margin, predicted))

    def compute(self, threshold: float) -> LabelScores | None:
        """The verdict on all labels seen by any process, after which they are forgotten; ``None`` without one."""
        if not self._batches:
            return None
        columns = [torch.cat(column) for column in zip(*self._batches, strict=True)]
        self._batches.clear()
        index, given, clean, believed, margin, predicted = gather_by_index(*columns)
        return score_beliefs(index, given, clean, believed, margin, predicted, threshold=threshold)


def score_beliefs(
    index: Tensor,
    given: Tensor,
    clean: Tensor,
    believed: Tensor,
    margin: Tensor,
    predicted: Tensor,
    *,
    threshold: float,
) -> LabelScores:
    """The verdict by how much each given label is believed; ``clean`` is -1 where it is not known."""
    known = clean if bool((clean >= 0).all()) else None
    return LabelScores(index, given, predicted, margin, believed, believed.double(), None, known, threshold)
