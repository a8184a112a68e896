"""How well a method separates clean labels from wrong ones. It needs the true labels, so it is for reports only."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torchmetrics.utilities import rank_zero_warn


def selection_metrics(
    clean_score: Tensor,
    selected: Tensor,
    given: Tensor,
    clean: Tensor,
    positives: Literal["clean", "wrong"] = "clean",
) -> dict[str, float]:
    """Precision, recall, F1 and AUC of a method that selects the labels it takes for clean.

    A value that is not defined (precision of an empty selection, recall without positives, AUC where all labels are
    clean, all are wrong, or a score is NaN) is NaN, with a warning.

    Args:
        clean_score: float ``[N]``, larger for a label that is likelier clean; only the order matters, ties count half.
        selected: bool ``[N]``, true for the labels that the method takes for clean.
        given: int64 ``[N]``, the labels trained on.
        clean: int64 ``[N]``, the true labels.
        positives: ``"clean"`` measures how well clean labels are selected; ``"wrong"`` how well wrong labels are
            detected, where the labels that are not selected count as detected. The AUC is the same for both.

    Returns:
        ``precision``, ``recall``, ``f1`` (``2 * hits / (selected + positives)``) and ``auc``.

    Raises:
        ValueError: where the tensors are not all ``[N]``, ``selected`` is not bool, or for another ``positives``.
    """
    if not clean_score.shape == selected.shape == given.shape == clean.shape or clean_score.ndim != 1:
        shapes = ", ".join(str(list(t.shape)) for t in (clean_score, selected, given, clean))
        raise ValueError(f"clean_score, selected, given and clean must all be [N], got {shapes}")
    if selected.dtype != torch.bool:
        raise ValueError(f"selected must be bool, got {selected.dtype}: compare the score with a threshold")
    if positives not in ("clean", "wrong"):
        raise ValueError(f"positives must be 'clean' or 'wrong', got {positives!r}")
    is_clean = given == clean
    positive, found = (is_clean, selected) if positives == "clean" else (~is_clean, ~selected)
    hits, chosen, existing = (int(mask.sum()) for mask in (positive & found, found, positive))
    return {
        "precision": _ratio("precision of the selection of labels", hits, chosen),
        "recall": _ratio("recall of the selection of labels", hits, existing),
        "f1": _ratio("f1 of the selection of labels", 2 * hits, chosen + existing),
        "auc": _auc(clean_score, is_clean),
    }


def memorisation(predicted: Tensor, given: Tensor, clean: Tensor) -> dict[str, float]:
    """How often predictions equal the given labels, separately for correctly and wrongly labelled samples.

    Args:
        predicted: int64 ``[N]``, the predicted classes.
        given: int64 ``[N]``, the labels trained on.
        clean: int64 ``[N]``, the true labels.

    Returns:
        ``fitted_clean`` for samples whose given label is correct, ``memorised_wrong`` for the others, in [0, 1]; NaN,
        with a warning, where there are no such samples.

    Raises:
        ValueError: where the tensors are not all ``[N]``.
    """
    if not predicted.shape == given.shape == clean.shape or given.ndim != 1:
        shapes = ", ".join(str(list(t.shape)) for t in (predicted, given, clean))
        raise ValueError(f"predicted, given and clean must all be [N], got {shapes}")
    fitted, is_clean = predicted == given, given == clean
    count = int(is_clean.sum())
    return {
        "fitted_clean": _ratio("accuracy on clean labels", int((fitted & is_clean).sum()), count),
        "memorised_wrong": _ratio("accuracy on wrong labels", int((fitted & ~is_clean).sum()), len(given) - count),
    }


def _ratio(name: str, part: int, whole: int) -> float:
    return part / whole if whole else _undefined(name)


def _undefined(name: str) -> float:
    rank_zero_warn(f"the {name} is not defined here (nothing is selected, or all labels are of one kind): it is NaN")
    return math.nan


def _auc(score: Tensor, positive: Tensor) -> float:
    """The probability that a positive scores above a negative, ties counted half (the Mann-Whitney U statistic).

    Not torchmetrics' binary_auroc: it applies a float32 sigmoid to scores outside [0, 1], so that large scores tie.
    """
    count = int(positive.sum())
    if count in (0, len(positive)) or bool(score.isnan().any()):
        return _undefined("AUC of clean against wrong labels")
    _, place, sizes = score.unique(return_inverse=True, return_counts=True)
    rank = sizes.cumsum(0) - (sizes - 1) / 2  # equal scores share their mean rank
    total = float(rank.double()[place][positive].sum())
    return (total - count * (count + 1) / 2) / (count * (len(positive) - count))
