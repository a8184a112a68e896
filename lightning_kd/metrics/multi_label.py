"""Metrics and decision rules for multi-label classification, each in the variants that papers use."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_kd.core.losses import check_label_values, check_shapes
from lightning_kd.core.multilabel_metrics import average_precision as _by_thresholds

__all__ = [
    "PrecisionRecall",
    "average_precision",
    "oracle_count_prediction",
    "precision_recall_f1",
    "share_prediction",
    "top_k_prediction",
]

Definition = Literal["sklearn", "rank", "voc11", "area"]


class PrecisionRecall(NamedTuple):
    """Precision, recall and F1 in [0, 1].

    Attributes:
        cp: mean over the classes of their precision.
        cr: mean over the classes of their recall.
        cf1: harmonic mean of ``cp`` and ``cr``.
        op: precision over the labels of all classes together.
        or_: recall over the labels of all classes together.
        of1: harmonic mean of ``op`` and ``or_``.
    """

    cp: float
    cr: float
    cf1: float
    op: float
    or_: float
    of1: float


def average_precision(scores: Tensor, target: Tensor, definition: Definition = "sklearn") -> Tensor:
    """The average precision of each class.

    - ``"sklearn"``: ``sum_k (R_k - R_{k-1}) P_k`` over the distinct scores: samples of equal score form one step;
    - ``"rank"``: the mean over the positives of the precision at their rank;
    - ``"area"``: the mean over the positives of the largest precision at their rank or a later one (PASCAL VOC from
      2010 on);
    - ``"voc11"``: the mean over the recall levels 0, 0.1, ..., 1 of the largest precision at that recall or a higher
      one (PASCAL VOC 2007).

    Where no scores are equal, ``sklearn = rank <= area``. Where some are, the last three depend on the order of the
    samples.

    Args:
        scores: float ``[N, C]``, larger for a likelier label: logits, or probabilities in float32.
        target: ``[N, C]`` of 1, 0 and -1 (unknown: left out).
        definition: one of the four above. Default: ``"sklearn"``.

    Returns:
        float64 ``[C]`` in [0, 1]; NaN for a class without a positive.

    Raises:
        ValueError: for another ``definition``, shapes that differ, or another value in ``target``.

    Source: Everingham et al., the PASCAL visual object classes challenge, section 4.2; scikit-learn.
    """
    if definition not in ("sklearn", "rank", "voc11", "area"):
        raise ValueError(f"definition must be 'sklearn', 'rank', 'voc11' or 'area', got {definition!r}: choose one")
    check_shapes(scores=(scores, "NC"), target=(target, "NC"))
    check_label_values(target, (-1, 0, 1))
    if definition == "sklearn" or not len(scores):
        return _by_thresholds(scores, target)
    order = scores.argsort(dim=0, descending=True, stable=True)
    label = target.gather(0, order)
    positive = label == 1
    hits, seen = positive.cumsum(0), (label >= 0).cumsum(0)
    precision = hits.double() / seen.clamp(min=1)
    total = hits[-1]
    if definition == "rank":
        return (precision * positive).sum(0) / total
    envelope = precision.flip(0).cummax(0).values.flip(0)
    if definition == "area":
        return (envelope * positive).sum(0) / total
    found = torch.zeros(scores.shape[1], dtype=torch.float64, device=scores.device)
    for tenth in range(11):  # compares integers: in floating point 3 of 10 can miss a recall of 0.3
        reached = 10 * hits >= tenth * total
        found += torch.where(reached, precision, 0.0).amax(0)
    return (found / 11).masked_fill(total == 0, float("nan"))


def precision_recall_f1(prediction: Tensor, target: Tensor, empty: Literal["skip", "zero"] = "skip") -> PrecisionRecall:
    """Precision, recall and F1, averaged over classes and over all labels together.

    ``cf1`` is the harmonic mean of the mean precision and the mean recall, not the mean of the classes' F1.

    Args:
        prediction: ``[N, C]`` of booleans, or of 1 and 0.
        target: ``[N, C]`` of 1, 0 and -1 (unknown: left out).
        empty: what counts for a class without a precision (it is never predicted) or without a recall (it has no
            positive): ``"skip"`` leaves the class out of that mean, ``"zero"`` counts it as 0. Default: ``"skip"``.

    Returns:
        Six numbers in [0, 1]; a mean over no class at all is 0.

    Raises:
        ValueError: for another ``empty``, shapes that differ, or another value in ``prediction`` or ``target``.
    """
    if empty not in ("skip", "zero"):
        raise ValueError(f"empty must be 'skip' or 'zero', got {empty!r}: give one of them")
    check_shapes(prediction=(prediction, "NC"), target=(target, "NC"))
    check_label_values(prediction, (0, 1), "prediction")
    check_label_values(target, (-1, 0, 1))
    predicted, positive = (prediction == 1) & (target >= 0), target == 1
    counts = ((predicted & positive).sum(0), predicted.sum(0), positive.sum(0))
    hits, named, there = (count.double() for count in counts)

    def mean(share: Tensor) -> float:
        return float((share.nan_to_num() if empty == "zero" else share).nanmean().nan_to_num())

    def f1(precision: float, recall: float) -> float:
        return 2 * precision * recall / (precision + recall) if precision + recall else 0.0

    cp, cr = mean(hits / named), mean(hits / there)
    op, or_ = (float((hits.sum() / count.sum()).nan_to_num()) for count in (named, there))
    return PrecisionRecall(cp, cr, f1(cp, cr), op, or_, f1(op, or_))


def top_k_prediction(scores: Tensor, k: int) -> Tensor:
    """Predicts for each image the ``k`` labels with the highest scores.

    Args:
        scores: float ``[N, C]``, larger for a likelier label.
        k: number of labels an image, from 1 to ``C``; papers mostly use 3.

    Returns:
        bool ``[N, C]``, true for the predicted labels.

    Raises:
        ValueError: for ``k`` out of range.
    """
    check_shapes(scores=(scores, "NC"))
    if not 1 <= k <= scores.shape[1]:
        raise ValueError(f"k must be from 1 to {scores.shape[1]}, got {k}: it is the number of labels an image")
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.topk(k, 1).indices, True)


def oracle_count_prediction(scores: Tensor, target: Tensor) -> Tensor:
    """Predicts for each image as many labels as it truly has, those with the highest scores.

    It reads the true number of labels from the target, so its F1 is higher than that of a threshold. Some papers, such
    as L2D (arXiv 2308.06453), report it. Labels that tie with the highest score left out are not predicted.

    Args:
        scores: float ``[N, C]``, larger for a likelier label.
        target: ``[N, C]`` of 1 and 0.

    Returns:
        bool ``[N, C]``, true for the predicted labels.

    Raises:
        ValueError: for shapes that differ, or another value in ``target``.
    """
    check_shapes(scores=(scores, "NC"), target=(target, "NC"))
    check_label_values(target, (0, 1))
    classes = scores.shape[1]
    count = (target == 1).sum(1, keepdim=True)
    following = scores.sort(1, descending=True).values.gather(1, count.clamp(max=classes - 1))
    return (scores > following) | (count == classes)


def share_prediction(scores: Tensor, shares: Tensor) -> Tensor:
    """Predicts each class for a given fraction of the images, those with the highest scores for it.

    It needs all test images at once. Images that tie with the lowest score chosen are predicted as well.

    Args:
        scores: float ``[N, C]``, larger for a likelier label.
        shares: float ``[C]`` in [0, 1], the fraction of images of each class, such as that in the training set. A
            class whose ``int(share * N)`` is 0 is predicted for no image.

    Returns:
        bool ``[N, C]``, true for the predicted labels.

    Raises:
        ValueError: for shapes that do not match, or a share out of range.
    """
    check_shapes(scores=(scores, "NC"), shares=(shares, "C"))
    if not bool(((shares >= 0) & (shares <= 1)).all()):
        raise ValueError(f"shares must be in [0, 1], got {shares.min():g} to {shares.max():g}: give fractions")
    # enlarged by the rounding error of float32, in which 0.29 * 100 is a little below 29
    count = (shares.double() * len(scores) * (1 + 2e-7) + 1e-9).long()
    ordered = scores.sort(0, descending=True).values
    least = ordered.gather(0, (count - 1).clamp(min=0)[None])
    return (scores >= least) & (count > 0)
