"""Labels of untagged images, by one threshold a class."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.losses import at_least_float32, check_shapes

__all__ = ["PseudoLabels", "pseudo_labels"]

# the official code never keeps more of the negatives: the likeliest of them are left out
MOST_NEGATIVES = 0.998
EPS = torch.finfo(torch.float64).eps


class PseudoLabels(NamedTuple):
    """``label`` float32 ``[n, C]`` of 1 and 0; ``mask`` bool ``[n, C]``, which of them count; and ``threshold``
    ``[C]``, the least score of a positive (infinite where there is none)."""

    label: Tensor
    mask: Tensor
    threshold: Tensor


def pseudo_labels(
    scores: Tensor, proportions: Tensor, keep_positive: float = 1.0, keep_negative: float = 1.0
) -> PseudoLabels:
    """Labels by one threshold a class, so that ``floor(proportion * n)`` images have it.

    With equal scores there may be more. Of the positives the ``keep_positive`` with the highest scores count, of the
    negatives the ``keep_negative`` (at most 0.998) with the lowest. A class with no positive among the tagged images
    gets none.

    Args:
        scores: ``[n, C]`` of all untagged images: logits, or probabilities in float32, of which many are equal.
        proportions: ``[C]`` in [0, 1], of the tagged images that have each class.
        keep_positive: share in [0, 1].
        keep_negative: share in [0, 1].

    Raises:
        ValueError: for shapes that do not belong together, scores that are not finite, and shares out of range.

    Source: arXiv 2305.02795, class-distribution-aware thresholds and reliability masks, as in the official code.
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
    # a product may be a little below the whole number that it stands for, as 0.29 * 100 is, in single precision more so
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
        ordered = np.partition(found[:, c], sorted(set(inside.values())))  # three ranks, not an order of all
        threshold[c] = ordered[inside["threshold"]] if "threshold" in inside else np.inf
        positive_cut[c] = ordered[inside["positive"]] if "positive" in inside else np.inf
        negative_cut[c] = ordered[inside["negative"]] if "negative" in inside else -np.inf
    least, sure, surely_not = (torch.from_numpy(x).to(scores.device) for x in (threshold, positive_cut, negative_cut))
    return PseudoLabels((scores >= least).float(), (scores >= sure) | (scores <= surely_not), least)
