"""Pseudo-labels of unlabelled images, by one threshold per class."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.losses import at_least_float32, check_shapes

__all__ = ["PseudoLabels", "pseudo_labels"]

# the official code never uses more than this share of the negatives: those with the highest scores are left out
MOST_NEGATIVES = 0.998
EPS = torch.finfo(torch.float64).eps


class PseudoLabels(NamedTuple):
    """The pseudo-labels of ``n`` images and ``C`` classes.

    Attributes:
        label: float32 ``[n, C]``, 1 for a positive and 0 for a negative pseudo-label.
        mask: bool ``[n, C]``, whether the pseudo-label enters the loss.
        threshold: ``[C]``, dtype of the scores: the lowest score of a positive pseudo-label of the class; infinite
            where the class has none.
    """

    label: Tensor
    mask: Tensor
    threshold: Tensor


def pseudo_labels(
    scores: Tensor, proportions: Tensor, keep_positive: float = 1.0, keep_negative: float = 1.0
) -> PseudoLabels:
    """Give each class to the images with the highest scores, so that the class is as frequent as among labelled images.

    Class ``c`` becomes positive for the ``floor(proportions[c] * n)`` images with the highest scores (for more where
    scores are tied), and negative for the others. The loss then uses only the most certain ones: the share
    ``keep_positive`` of the positives with the highest scores, and the share ``keep_negative`` of the negatives with
    the lowest scores. A class that no labelled image has gets no positive.

    Args:
        scores: ``[n, C]``, the scores of all unlabelled images. Give logits: float32 probabilities are often tied.
        proportions: float ``[C]`` in [0, 1], the share of the labelled images that have each class.
        keep_positive: share of the positives that are used, in [0, 1].
        keep_negative: share of the negatives that are used, in [0, 1]; values above 0.998 count as 0.998.

    Returns:
        ``PseudoLabels`` on the device of ``scores``.

    Raises:
        ValueError: if the shapes do not match, a score is not finite, or a share is not in [0, 1].

    Source: arXiv 2305.02795, class-distribution-aware thresholding and the reliability masks of the official code.
    """
    check_shapes(scores=(scores, "nC"), proportions=(proportions, "C"))
    check_numbers(least=0, most=1, keep_positive=keep_positive, keep_negative=keep_negative)
    if not bool(((proportions >= 0) & (proportions <= 1)).all()):
        raise ValueError(
            f"proportions must be in [0, 1], got {float(proportions.min()):g} to {float(proportions.max()):g}: give "
            "shares of images"
        )
    if not bool(scores.isfinite().all()):
        raise ValueError("scores must be finite, got NaN or infinity: look at the network")
    (scores,) = at_least_float32(scores.detach())
    n, found = len(scores), scores.cpu().numpy()
    threshold, positive_cut, negative_cut = (
        np.full(scores.shape[1], fill, found.dtype) for fill in (np.inf, np.inf, -np.inf)
    )
    # 0.29 * 100 is 28.999...: rounding error must not lower the count by one; float32 needs more slack than float64
    slack = 1 + 8 * EPS + (0.0 if proportions.dtype == torch.float64 else torch.finfo(proportions.dtype).eps)
    for c, share in enumerate(proportions.tolist()):
        positives, kept, negatives = (
            math.floor(value * n * slack)
            for value in (share, keep_positive * share, min(keep_negative, MOST_NEGATIVES) * (1 - share))
        )
        ranks = {"threshold": n - positives, "positive": n - kept, "negative": negatives - 1}
        inside = {name: rank for name, rank in ranks.items() if 0 <= rank < n}
        if not inside:
            continue
        ordered = np.partition(found[:, c], sorted(set(inside.values())))  # three ranks are enough: no full sort
        threshold[c] = ordered[inside["threshold"]] if "threshold" in inside else np.inf
        positive_cut[c] = ordered[inside["positive"]] if "positive" in inside else np.inf
        negative_cut[c] = ordered[inside["negative"]] if "negative" in inside else -np.inf
    least, sure, surely_not = (torch.from_numpy(x).to(scores.device) for x in (threshold, positive_cut, negative_cut))
    return PseudoLabels((scores >= least).float(), (scores >= sure) | (scores <= surely_not), least)
