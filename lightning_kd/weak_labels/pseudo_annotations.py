"""Select pseudo-annotations, predicted by a crowd model, that make the classes of all annotations more balanced."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.annotations import check_annotations
from lightning_kd.core.losses import check_shapes

__all__ = ["AnnotationBalance", "annotation_balance", "annotation_weights", "class_quotas", "select_pseudo_annotations"]

# cells (item, annotator) that are processed at once, at most
BLOCK = 1 << 20


class AnnotationBalance(NamedTuple):
    """How unequal the numbers of annotations of the classes are.

    Attributes:
        ratio: annotations of the largest class divided by those of the smallest.
        distance: total variation distance between the shares of the classes and equal shares, in [0, 1).
    """

    ratio: float
    distance: float


def annotation_balance(counts: Tensor) -> AnnotationBalance:
    """Imbalance of ``counts`` ``[C]``, the annotations of each class; a count of 0 is treated as 1 in the ratio."""
    wide = counts.double()
    distance = (wide / wide.sum().clamp(min=1) - 1 / len(wide)).abs().sum() / 2
    return AnnotationBalance(float(wide.max() / wide.min().clamp(min=1)), float(distance))


def class_quotas(counts: Tensor, budget: int, balance: float = 1.0) -> Tensor:
    """Divide ``budget`` pseudo-annotations among the classes, in proportion to ``max(count, 1) ** -balance``.

    Quotas are rounded down; the remaining ones go to the classes with the largest fractional parts, on ties to the
    smaller class index.

    Args:
        counts: int64 ``[C]``, the number of annotations of each class.
        budget: number of pseudo-annotations, at least 0.
        balance: how strongly rare classes are preferred, at least 0; 0 gives all classes the same quota.

    Returns:
        int64 ``[C]``, sum ``budget``.

    Raises:
        ValueError: if an argument is out of range.

    Source: a reconstruction; the abstract of arXiv 2107.05039 gives no formula.
    """
    check_numbers(least=0, whole=True, budget=budget)
    check_numbers(least=0, balance=balance)
    weight = counts.double().clamp(min=1) ** -balance
    share = budget * weight / weight.sum()
    quota = (share + 1e-9).floor()  # 40 * 0.25 may be rounded to a little less than 10
    order = (-(share - quota)).round(decimals=9).sort(stable=True).indices
    quota[order[: budget - int(quota.sum())]] += 1
    return quota.long()


def annotation_weights(counts: Tensor, exponent: float = 0.5) -> Tensor:
    """The weight of an annotation of each class, float64 ``[C]``, proportional to ``max(count, 1) ** -exponent``.

    The weights are scaled so that their mean over all annotations is 1.

    Args:
        counts: int64 ``[C]``, the number of annotations of each class.
        exponent: at least 0; 0 gives all annotations the same weight, 1 gives all classes the same total weight.

    Raises:
        ValueError: if ``exponent`` is below 0.

    Source: a reconstruction, see ``class_quotas``.
    """
    check_numbers(least=0, exponent=exponent)
    weight = counts.double().clamp(min=1) ** -exponent
    total = (weight * counts).sum()
    return weight * counts.sum() / total if total > 0 else torch.ones_like(weight)


def select_pseudo_annotations(
    predicted: Tensor, annotations: Any, budget: int, balance: float = 1.0, threshold: float = 0.0
) -> Tensor:
    """Select the most confident predictions for cells without annotation, with a quota for each class.

    A cell is a pair of item and annotator. It belongs to its most probable class. Of each class the cells with the
    highest probability, at least ``threshold``, are selected, up to the quota from ``class_quotas`` (on ties the
    earlier cells). An unfilled quota is not given to other classes, since the frequent classes would take it. Cells of
    annotators without any annotation are never selected, because nothing is known about these annotators.

    Args:
        predicted: probabilities ``[N, R, C]`` of what each annotator would give to each item.
        annotations: integers ``[N, R]``, the given annotations, -1 for a missing one. They are never changed.
        budget: largest number of pseudo-annotations, at least 0.
        balance: how strongly rare classes are preferred, see ``class_quotas``.
        threshold: lowest probability, in [0, 1]. The probabilities of ``annotator_probabilities`` are flat: early in
            training none reaches 0.9.

    Returns:
        int64 ``[n, 3]``: rows of item, annotator and class, ordered by class and then by descending probability.

    Raises:
        ValueError: if the shapes do not match, a prediction is not finite, or an argument is out of range.

    Source: a reconstruction, see ``class_quotas``.
    """
    given = check_annotations(annotations, predicted.shape[-1])
    check_shapes(predicted=(predicted, "NRC"), annotations=(given, "NR"))
    return select_cells(_blocks(predicted), given, budget, balance, threshold)


def _blocks(predicted: Tensor) -> Iterable[Tensor]:
    cells = max(1, predicted.shape[1] * predicted.shape[2])
    return predicted.split(max(1, BLOCK // cells))


def select_cells(
    blocks: Iterable[Tensor], annotations: Tensor, budget: int, balance: float | None = 1.0, threshold: float = 0.0
) -> Tensor:
    """``select_pseudo_annotations`` for predictions that arrive in blocks of items, to save memory.

    Only one block and the best cells so far are kept in memory.

    Args:
        blocks: predictions ``[n, R, C]`` of consecutive items.
        annotations: integers ``[N, R]``, -1 for a missing annotation.
        budget: see ``select_pseudo_annotations``.
        balance: see ``select_pseudo_annotations``; ``None`` selects the most confident cells of all classes together.
        threshold: see ``select_pseudo_annotations``.

    Returns:
        see ``select_pseudo_annotations``; with ``balance=None`` ordered by descending probability.
    """
    check_numbers(least=0, whole=True, budget=budget)
    check_numbers(least=0, most=1, remedy="give a probability", threshold=threshold)
    given = annotations.cpu().numpy()
    known = (given >= 0).any(0)
    best: _BestCells | None = None
    start = 0
    for block in blocks:
        confidence, label = (values.cpu().numpy() for values in block.detach().max(2))
        if not np.isfinite(confidence).all():
            raise ValueError("predicted must be finite, got NaN or infinity: check that training has not diverged")
        if best is None:
            classes = block.shape[2]
            counts = torch.from_numpy(np.bincount(given[given >= 0], minlength=classes))
            best = _BestCells(np.array([budget]) if balance is None else class_quotas(counts, budget, balance).numpy())
        free = (given[start : start + len(block)] < 0) & known & (confidence >= threshold)
        cell = np.flatnonzero(free)
        best.add(confidence.ravel()[cell], label.ravel()[cell], cell + start * given.shape[1])
        start += len(block)
    if best is None:
        return torch.zeros(0, 3, dtype=torch.int64)
    item, annotator = np.divmod(best.cell, given.shape[1])
    return torch.from_numpy(np.stack([item, annotator, best.label], axis=1).astype(np.int64))


class _BestCells:
    """The most confident cells so far: of each class, or with a single quota of all classes together."""

    def __init__(self, quota: np.ndarray) -> None:
        self.quota = quota
        self.confidence, self.label, self.cell = np.zeros(0), np.zeros(0, np.int64), np.zeros(0, np.int64)
        self._lowest_kept = np.where(quota > 0, -np.inf, np.inf)

    def _group(self, label: np.ndarray) -> np.ndarray:
        return label if len(self.quota) > 1 else np.zeros_like(label)

    def add(self, confidence: np.ndarray, label: np.ndarray, cell: np.ndarray) -> None:
        """Add new cells, which come after all earlier ones, if more confident than the worst one of their group."""
        better = confidence > self._lowest_kept[self._group(label)]
        confidence = np.concatenate([self.confidence, confidence[better]])
        label, cell = np.concatenate([self.label, label[better]]), np.concatenate([self.cell, cell[better]])
        group = self._group(label)
        order = np.lexsort((cell, -confidence, group))
        group = group[order]
        rank = np.arange(len(order)) - np.searchsorted(group, group)
        kept = order[rank < self.quota[group]]
        self.confidence, self.label, self.cell = confidence[kept], label[kept], cell[kept]
        count = np.bincount(self._group(self.label), minlength=len(self.quota))
        last = np.append(self.confidence, np.inf)[count.cumsum() - 1]  # of each group, where it has any
        self._lowest_kept = np.where(count < self.quota, -np.inf, np.where(count > 0, last, np.inf))
