"""Relative flatness of a network's classifier, and neural collapse of its features to their class means.

Both are closed forms in the features, the classifier's weight and the logits: no derivative is computed.
"""

from __future__ import annotations

import torch
from torch import Tensor


def relative_flatness(feature: Tensor, weight: Tensor, logits: Tensor) -> float:
    """Relative flatness ``kappa`` of a linear classifier under softmax cross-entropy.

    ``kappa = mean_n |a_n|^2 tr(W^T (diag(p_n) - p_n p_n^T) W)``, the sum over pairs of classes ``s, t`` of
    ``<w_s, w_t> tr(H_st)`` with the blocks ``H_st`` of the Hessian of the mean loss in the weight. It does not change
    when the layers of a ReLU network are rescaled such that the network computes the same function, and it does not
    depend on the targets.

    Args:
        feature: ``a``, float ``[N, D]``, the input of the classifier.
        weight: ``W``, float ``[C, D]``, the weight of the classifier.
        logits: float ``[N, C]``, the output of the classifier (bias included), whose softmax is ``p``.

    Returns:
        ``kappa``, at least 0, computed in float64.

    Raises:
        ValueError: where the shapes do not match, or there is no sample.

    Source: Petzka et al., arXiv 2001.00939, definition 3, in closed form.
    """
    if feature.ndim != 2 or weight.ndim != 2 or len(feature) != len(logits) or feature.shape[1] != weight.shape[1]:
        raise ValueError(
            f"feature must be [N, D], weight [C, D] and logits [N, C], got {list(feature.shape)}, "
            f"{list(weight.shape)} and {list(logits.shape)}: give the input, weight and output of one linear layer"
        )
    return float((_double(feature).square().sum(1) * _feature_traces(weight, logits)).mean())


def feature_hessian_trace(weight: Tensor, logits: Tensor) -> float:
    """Trace of the Hessian of softmax cross-entropy with respect to the features, in closed form.

    ``mean_n tr(W^T (diag(p_n) - p_n p_n^T) W)``.

    Args:
        weight: ``W``, float ``[C, D]``, the weight of the linear classifier.
        logits: float ``[N, C]``, whose softmax is ``p``.

    Returns:
        The trace, at least 0, computed in float64.

    Raises:
        ValueError: where the shapes do not match, or there is no sample.
    """
    return float(_feature_traces(weight, logits).mean())


def neural_collapse(feature: Tensor, target: Tensor, num_classes: int) -> float:
    """Neural collapse NC1: the variance of the features within classes divided by that between class means.

    ``sum_n |a_n - mu_{y_n}|^2 / sum_n |mu_{y_n} - mu|^2``, with the class means ``mu_c`` and the mean ``mu`` of all
    samples: 0 where the features of each class are one point.

    Args:
        feature: ``a``, float ``[N, D]``.
        target: ``y``, int64 ``[N]``; classes without a sample are ignored.
        num_classes: number of classes ``C``.

    Returns:
        The ratio, computed in float64; NaN where the class means are equal (as with one class only).

    Raises:
        ValueError: where the shapes do not match, there is no sample, or a target is out of range.

    Source: Papyan et al., arXiv 2008.08186, property NC1, as the ratio of the traces of the two covariances.
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
    # where the class means differ by rounding alone, the ratio is noise
    return within / between if between > 1e-28 * float(feature.square().sum()) else float("nan")


def _feature_traces(weight: Tensor, logits: Tensor) -> Tensor:
    """``tr(W^T (diag(p_n) - p_n p_n^T) W)`` of each sample, float64 ``[N]``."""
    if weight.ndim != 2 or logits.ndim != 2 or len(weight) != logits.shape[1] or not len(logits):
        raise ValueError(
            f"weight must be [C, D] and logits [N, C] of at least one sample, got {list(weight.shape)} and "
            f"{list(logits.shape)}"
        )
    rows, p = _double(weight), _double(logits).softmax(1)
    # the same as half the mean squared distance of two rows drawn with probabilities p; unlike the difference above it
    # keeps its digits where p is nearly one-hot
    distance = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").square()
    return ((p @ distance) * p).sum(1) / 2


def _double(values: Tensor) -> Tensor:
    return values.detach().to("cpu", torch.float64)  # not every device has float64
