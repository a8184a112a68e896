"""Label scores of BLDR: the probabilities that its negative head gives to the given labels, collected over an epoch."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_kd.core.batch import Batch
from lightning_kd.core.distributed import gather_by_index
from lightning_kd.core.two_pass_step import second_pass
from lightning_kd.noisy_labels.bldr_terms import log_mean
from lightning_kd.noisy_labels.label_scores import LabelScores, logit_margin


class EpochScores:
    """Collects the negative head's probabilities of the given labels in the steps of an epoch."""

    def __init__(self) -> None:
        self._batches: list[tuple[Tensor, ...]] = []

    def clear(self) -> None:
        """Delete all collected values."""
        self._batches.clear()

    @torch.no_grad()
    def record_batch(self, batch: Batch, index: Tensor, positive: Tensor, negative: Tensor) -> None:
        """Store the negative head's probability of each label of a batch, with the margin of both heads.

        Nothing is stored in the second evaluation of a batch by an optimizer such as SAM.

        Args:
            batch: batch whose ``target`` are the given labels.
            index: int64 ``[B]``, the samples.
            positive: ``[B, C]``, logits of the positive head.
            negative: ``[B, C]``, logits of the negative head.
        """
        if second_pass():
            return
        target = batch.target
        clean = batch.extras.get("clean_target", torch.full_like(target, -1))
        scores = log_mean(positive, negative)
        probability = negative.softmax(1).gather(1, target[:, None]).squeeze(1)
        margin, predicted = logit_margin(scores, target), scores.argmax(1)
        self._batches.append((index, target, clean, probability, margin, predicted))

    def compute(self, threshold: float) -> LabelScores | None:
        """The label scores of all samples seen by any process, or ``None`` without any; clears the collected values."""
        if not self._batches:
            return None
        columns = [torch.cat(column) for column in zip(*self._batches, strict=True)]
        self._batches.clear()
        index, given, clean, probability, margin, predicted = gather_by_index(*columns)
        return scores_of_probabilities(index, given, clean, probability, margin, predicted, threshold=threshold)


def scores_of_probabilities(
    index: Tensor,
    given: Tensor,
    clean: Tensor,
    probability: Tensor,
    margin: Tensor,
    predicted: Tensor,
    *,
    threshold: float,
) -> LabelScores:
    """Label scores with the negative head's probabilities as score; ``clean`` is -1 where the true label is unknown."""
    known = clean if bool((clean >= 0).all()) else None
    return LabelScores(index, given, predicted, margin, probability, probability.double(), None, known, threshold)
