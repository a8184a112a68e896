"""Labels by several annotators: checking them, and their majority vote."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_kd.argument_checks import check_numbers

__all__ = ["check_annotations", "majority_vote", "observed_cells"]


def check_annotations(annotations: Any, num_classes: int) -> Tensor:
    """Check annotations and return them as a tensor ``[N, R]``, of their own integer dtype to save memory.

    Args:
        annotations: integers ``[N, R]``, a tensor or an array: the class that each of ``R`` annotators gave to each of
            ``N`` items, -1 for none.
        num_classes: C.

    Raises:
        ValueError: for a wrong shape or dtype, and for a class below -1 or above C - 1.
    """
    check_numbers(least=2, whole=True, num_classes=num_classes)
    given = torch.as_tensor(annotations)
    if given.ndim != 2 or given.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8):
        raise ValueError(
            f"annotations must be integers [N, R], a column for each annotator, got {given.dtype} {list(given.shape)}: "
            "give -1 for none"
        )
    if given.numel():
        low, high = (int(value) for value in given.aminmax())
        if low < -1 or high >= num_classes:
            raise ValueError(
                f"annotations must be classes from 0 to {num_classes - 1}, or -1 for none, got {low} to {high}: "
                "correct them"
            )
    return given


def observed_cells(annotations: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Item, annotator and class, int64 each, of all annotations in ``[N, R]`` that are not -1, item by item."""
    item, annotator = (annotations >= 0).nonzero(as_tuple=True)
    return item, annotator, annotations[item, annotator].long()


def majority_vote(annotations: Any, num_classes: int) -> Tensor:
    """The share of the votes for each class. ``argmax(1)`` gives the majority; in a tie, the smallest class.

    Args:
        annotations: integers ``[N, R]``, -1 for none.
        num_classes: C.

    Returns:
        float64 ``[N, C]``, rows that sum to 1; uniform for an item without annotations.

    Raises:
        ValueError: see ``check_annotations``.
    """
    given = check_annotations(annotations, num_classes)
    item, _, label = observed_cells(given)
    votes = torch.zeros(len(given) * num_classes, dtype=torch.float64, device=given.device)
    votes = votes.index_add(0, item * num_classes + label, torch.ones_like(label, dtype=torch.float64))
    votes = votes.view(len(given), num_classes)
    count = votes.sum(1, keepdim=True)
    return torch.where(count > 0, votes / count.clamp(min=1), 1 / num_classes)
