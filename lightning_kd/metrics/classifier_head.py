"""How flat the classifier of a network is, and how far its features have collapsed to their class means.

Closed forms in the features, the classifier's weight and the logits: no derivative is taken.
"""

from __future__ import annotations

import torch
from torch import Tensor


def relative_flatness(feature: Tensor, weight: Tensor, logits: Tensor) -> float:
    """Relative flatness ``kappa`` of a linear classifier under softmax cross-entropy.

    ``kappa = mean_n |a_n|^2 tr(W^T (diag(p_n) - p_n p_n^T) W)``, the sum over pairs of classes ``s, t`` of
    ``<w_s, w_t> tr(H_st)`` with the blocks ``H_st`` of the Hessian of the mean loss in the weight. Rescaling the layers
    of a ReLU network so that its function stays does not change it. The targets do not enter.

    Args:
        feature: ``a``, ``[N, D]``, what enters the classifier.
        weight: ``W``, ``[C, D]``.
        logits: ``[N, C]``, with the bias, whose softmax is ``p``.

    Returns:
        ``kappa``, at least 0, computed in float64.

    Raises:
        ValueError: for shapes that do not fit, or no sample.

    Source: Petzka et al., arXiv 2001.00939, definition 3, in closed form.
    """
    if feature.ndim != 2 or weight.ndim != 2 or len(feature) != len(logits) or feature.shape[1] != weight.shape[1]:
        raise ValueError(
            f"feature must be [N, D], weight [C, D] and logits [N, C], got {list(feature.shape)}, "
            f"{list(weight.shape)} and {list(logits.shape)}: give the input, weight and output of one linear layer"
        )
    return float((_double(feature).square().sum(1) * _feature_traces(weight, logits)).mean())


def feature_hessian_trace(weight: Tensor, logits: Tensor) -> float:
    """Trace of the Hessian of softmax cross-entropy in the features, ``mean_n tr(W^T (diag(p_n) - p_n p_n^T) W)``.

    Args:
        weight: ``W``, ``[C, D]`` of the linear classifier.
        logits: ``[N, C]``, whose softmax is ``p``.

    Returns:
        The trace, at least 0, computed in float64.

    Raises:
        ValueError: for shapes that do not fit, or no sample.
    """
    return float(_feature_traces(weight, logits).mean())


def neural_collapse(feature: Tensor, target: Tensor, num_classes: int) -> float:
    """NC1, the scatter of features within their classes over that between the classes.

    ``sum_n |a_n - mu_{y_n}|^2 / sum_n |mu_{y_n} - mu|^2``, with the class means ``mu_c`` and the mean ``mu`` of all
    samples: 0 once the features of each class have collapsed to one point.

    Args:
        feature: ``a``, ``[N, D]``.
        target: ``y``, int64 ``[N]``; classes without a sample do not count.
        num_classes: number of classes ``C``.

    Returns:
        The ratio, computed in float64; NaN where the class means do not differ (as with one class only).

    Raises:
        ValueError: for shapes that do not fit, no sample, or a target out of range.

    Source: Papyan et al., arXiv 2008.08186, property NC1, by the traces of the two covariances.
    """
    if feature.ndim != 2 or target.shape != feature.shape[:1] or not len(target):
        raise ValueError(
            f"feature must be [N, D] and target [N] of at least one sample, got {list(feature.shape)} and "
            f"{list(target.shape)}"
        )
    if target.min() < 0 or target.max() >= num_classes:
        raise ValueError(
            f"target must be in 0..{num_classes - 1}, got {int(target.min())}..{int(target.max())}: leave out samples "
            "without a known class"
        )
    feature, target = _double(feature), target.detach().cpu()
    sums = feature.new_zeros(num_classes, feature.shape[1]).index_add_(0, target, feature)
    count = torch.bincount(target, minlength=num_classes)
    mean = (sums / count.clamp(min=1)[:, None])[target]
    within = float((feature - mean).square().sum())
    between = float((mean - feature.mean(0)).square().sum())
    # class means that are equal but for rounding say nothing
    return within / between if between > 1e-28 * float(feature.square().sum()) else float("nan")


def _feature_traces(weight: Tensor, logits: Tensor) -> Tensor:
    """``tr(W^T Lambda_n W)`` of each sample, float64 ``[N]``."""
    if weight.ndim != 2 or logits.ndim != 2 or len(weight) != logits.shape[1] or not len(logits):
        raise ValueError(
            f"weight must be [C, D] and logits [N, C] of at least one sample, got {list(weight.shape)} and "
            f"{list(logits.shape)}"
        )
    rows, p = _double(weight), _double(logits).softmax(1)
    # as the mean squared distance of two rows drawn by p: nothing cancels where p is nearly one-hot
    distance = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").square()
    return ((p @ distance) * p).sum(1) / 2


def _double(values: Tensor) -> Tensor:
    return values.detach().to("cpu", torch.float64)  # not every device has float64
