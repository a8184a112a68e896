"""Metrics of multi-label classification: average precision, and F1 over classes and over all labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

__all__ = ["MultiLabelMetric", "average_precision", "f1_of_counts"]


def average_precision(scores: Tensor, target: Tensor) -> Tensor:
    """The average precision of each class, by scikit-learn's definition.

    ``sum_k (R_k - R_{k-1}) * P_k``, with recall ``R_k`` and precision ``P_k`` at the distinct scores from high to low,
    without interpolation. Equal scores form one step, so that their order does not matter.

    Args:
        scores: ``[N, C]``, larger for likelier labels.
        target: ``[N, C]`` of 1, 0 and -1 (not known: ignored).

    Returns:
        float64 ``[C]`` in [0, 1]; NaN for a class without positives.
    """
    if not len(scores):
        return scores.new_full(scores.shape[1:], float("nan"), dtype=torch.float64)
    ordered, order = scores.sort(0, descending=True)
    label = target.gather(0, order)
    positive = label == 1
    hits = positive.cumsum(0)  # int64: a sum of floats is not deterministic on a GPU
    seen = (label >= 0).cumsum(0)
    # equal scores all have the precision at the last of them
    row = torch.arange(len(scores), device=scores.device)[:, None].expand_as(ordered)
    is_last = torch.ones_like(positive)
    is_last[:-1] = ordered[:-1] != ordered[1:]
    last = row.masked_fill(~is_last, len(scores)).flip(0).cummin(0).values.flip(0)
    precision = hits.gather(0, last).double() / seen.gather(0, last).clamp(min=1)
    return (precision * positive).sum(0) / hits[-1]


def f1_of_counts(hits: Tensor, predicted: Tensor, positives: Tensor) -> tuple[float, float]:
    """``(cf1, of1)``: F1 of the mean precision and recall over classes, and F1 over all labels together.

    Classes that were never predicted are left out of the mean precision, those without positives out of the mean
    recall. ``cf1`` is the harmonic mean of the two means, not the mean of the classes' F1.

    Args:
        hits: ``[C]``, number of true positives of each class.
        predicted: ``[C]``, number of predicted labels of each class.
        positives: ``[C]``, number of positive labels of each class.
    """

    def harmonic(precision: Tensor, recall: Tensor) -> float:
        value = 2 * precision * recall / (precision + recall)
        return float(value.nan_to_num())

    hits, predicted, positives = hits.double(), predicted.double(), positives.double()
    by_class = harmonic((hits / predicted).nanmean(), (hits / positives).nanmean())
    return by_class, harmonic(hits.sum() / predicted.sum(), hits.sum() / positives.sum())


class MultiLabelMetric(Metric):
    """``map``, ``cf1`` and ``of1`` over all batches and processes, in [0, 1].

    ``map`` is the mean of ``average_precision`` over the classes with positives; ``absent_classes`` is the number of
    classes without.

    Args:
        num_classes: ``C``.
        threshold: labels with at least this score are predicted; 0.5 for probabilities, 0 for logits.
    """

    full_state_update = False
    scores: list[Tensor]
    labels: list[Tensor]

    def __init__(self, num_classes: int, threshold: float = 0.5) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.threshold = threshold
        self.add_state("scores", [], dist_reduce_fx="cat")
        self.add_state("labels", [], dist_reduce_fx="cat")

    def update(self, scores: Tensor, target: Tensor) -> None:
        """Add a batch: ``scores`` ``[B, C]``, larger for likelier labels, and ``target`` ``[B, C]`` of 1, 0 and -1
        (not known)."""
        self.scores.append(scores.detach().float())
        self.labels.append(target.to(torch.int8))

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """torchmetrics' ``sync``, after giving a process without batches empty rows of the others' shape."""
        if not self.scores:
            empty = torch.empty(0, self.num_classes, device=self.device)
            self.update(empty, empty)
        super().sync(*args, **kwargs)

    def compute(self) -> dict[str, float]:
        # on the CPU, as MPS has no float64
        scores, label = dim_zero_cat(self.scores).cpu(), dim_zero_cat(self.labels).cpu()
        found = average_precision(scores, label)
        predicted = (scores >= self.threshold) & (label >= 0)
        positive = label == 1
        cf1, of1 = f1_of_counts((predicted & positive).sum(0), predicted.sum(0), positive.sum(0))
        absent = int(found.isnan().sum())
        mean = float(found.nanmean()) if absent < self.num_classes else 0.0
        return {"map": mean, "cf1": cf1, "of1": of1, "absent_classes": float(absent)}
