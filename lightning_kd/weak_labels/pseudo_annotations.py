"""Which annotations that nobody gave are taken from a crowd model, so that their classes become more equal."""

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

# cells that are looked at together
BLOCK = 1 << 20


class AnnotationBalance(NamedTuple):
    """``ratio``, the largest class's annotations by the smallest's, and ``distance``, the total variation between the
    shares of the classes and equal ones."""

    ratio: float
    distance: float


def annotation_balance(counts: Tensor) -> AnnotationBalance:
    """How unequal ``counts`` ``[C]`` of annotations are; of none there is taken to be one."""
    wide = counts.double()
    distance = (wide / wide.sum().clamp(min=1) - 1 / len(wide)).abs().sum() / 2
    return AnnotationBalance(float(wide.max() / wide.min().clamp(min=1)), float(distance))


def class_quotas(counts: Tensor, budget: int, balance: float = 1.0) -> Tensor:
    """How many of ``budget`` pseudo-annotations each class gets: shares proportional to ``max(count, 1) ** -balance``.

    They are rounded down, and what is left goes to the largest fractional parts, of equal ones to the smallest class.

    Args:
        counts: int64 ``[C]``, the annotations of each class.
        budget: 0 or more.
        balance: 0 gives each class the same.

    Returns:
        int64 ``[C]`` that sum to ``budget``.

    Raises:
        ValueError: for numbers out of range.

    Source: a reconstruction, as arXiv 2107.05039 has no formula in its abstract.
    """
    check_numbers(least=0, whole=True, budget=budget)
    check_numbers(least=0, balance=balance)
    weight = counts.double().clamp(min=1) ** -balance
    share = budget * weight / weight.sum()
    quota = (share + 1e-9).floor()  # 40 quarters may be a little less than 10
    order = (-(share - quota)).round(decimals=9).sort(stable=True).indices
    quota[order[: budget - int(quota.sum())]] += 1
    return quota.long()


def annotation_weights(counts: Tensor, exponent: float = 0.5) -> Tensor:
    """The weight of an annotation of each class, float64 ``[C]``: proportional to ``max(count, 1) ** -exponent``, with
    mean 1 over all annotations.

    Args:
        counts: int64 ``[C]``, the annotations of each class.
        exponent: 0 weighs all alike, 1 all classes.

    Raises:
        ValueError: for an exponent below 0.

    Source: a reconstruction, see ``class_quotas``.
    """
    check_numbers(least=0, exponent=exponent)
    weight = counts.double().clamp(min=1) ** -exponent
    total = (weight * counts).sum()
    return weight * counts.sum() / total if total > 0 else torch.ones_like(weight)


def select_pseudo_annotations(
    predicted: Tensor, annotations: Any, budget: int, balance: float = 1.0, threshold: float = 0.0
) -> Tensor:
    """The most confident predictions for the cells that nobody annotated, so many of each class as ``class_quotas``.

    A cell belongs to its likeliest class. Of each class the cells with a probability of ``threshold`` or more are taken
    in descending order (equal ones in the order of the cells), up to its quota. What a class cannot fill is left: else
    the frequent classes would take it. Cells of annotators who annotated nothing are left out: nothing is known of
    them.

    Args:
        predicted: ``[N, R, C]``, what each annotator would probably give to each item.
        annotations: integers ``[N, R]``, what is there (and is never changed), -1 where there is none.
        budget: how many at most, 0 or more.
        balance: how strongly rare classes are preferred; 0 gives all the same quota.
        threshold: in [0, 1]. Probabilities of ``annotator_probabilities`` are flat: 0.9 selects nothing at first.

    Returns:
        int64 ``[n, 3]``, rows of item, annotator and class; by class, then in descending confidence.

    Raises:
        ValueError: for shapes that do not belong together, predictions that are not finite, and numbers out of range.

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
    """``select_pseudo_annotations`` of predictions that come as blocks ``[n, R, C]`` of items, in their order: not more
    than the best cells so far are held beside one of them.

    Args:
        blocks: of the predictions.
        annotations: int64 ``[N, R]``.
        budget: see there.
        balance: see there; ``None`` takes the most confident cells of all classes together.
        threshold: see there.

    Returns:
        as there; with ``balance=None`` in descending confidence.
    """
    check_numbers(least=0, whole=True, budget=budget)
    check_numbers(least=0, most=1, remedy="give a probability", threshold=threshold)
    given = annotations.cpu().numpy()
    known = (given >= 0).any(0)
    best: _Best | None = None
    start = 0
    for block in blocks:
        confidence, label = (values.cpu().numpy() for values in block.detach().max(2))
        if not np.isfinite(confidence).all():
            raise ValueError("predicted must be finite, got NaN or infinity: look at the network")
        if best is None:
            classes = block.shape[2]
            counts = torch.from_numpy(np.bincount(given[given >= 0], minlength=classes))
            best = _Best(np.array([budget]) if balance is None else class_quotas(counts, budget, balance).numpy())
        free = (given[start : start + len(block)] < 0) & known & (confidence >= threshold)
        cell = np.flatnonzero(free)
        best.add(confidence.ravel()[cell], label.ravel()[cell], cell + start * given.shape[1])
        start += len(block)
    if best is None:
        return torch.zeros(0, 3, dtype=torch.int64)
    item, annotator = np.divmod(best.cell, given.shape[1])
    return torch.from_numpy(np.stack([item, annotator, best.label], axis=1).astype(np.int64))


class _Best:
    """The most confident cells of each group so far: of each class, or with one quota of all together."""

    def __init__(self, quota: np.ndarray) -> None:
        self.quota = quota
        self.confidence, self.label, self.cell = np.zeros(0), np.zeros(0, np.int64), np.zeros(0, np.int64)
        self._least = np.where(quota > 0, -np.inf, np.inf)

    def _group(self, label: np.ndarray) -> np.ndarray:
        return label if len(self.quota) > 1 else np.zeros_like(label)

    def add(self, confidence: np.ndarray, label: np.ndarray, cell: np.ndarray) -> None:
        """Take those cells, which come after all earlier ones, that are better than what there is."""
        better = confidence > self._least[self._group(label)]
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
        self._least = np.where(count < self.quota, -np.inf, np.where(count > 0, last, np.inf))
