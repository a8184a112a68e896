"""The losses and rules of BLDR as functions of logits ``[B, C]``; half precision is computed in float32.

All refuse tensors whose shapes do not belong together, targets that are not int64 and, on a CPU, targets out of range.

Source of all: Zong et al., "Noise-Robust Bidirectional Learning with Dynamic Sample Reweighting", arXiv 2209.01334; the
separate noise variables ``u`` and ``v`` are those of Liu et al., "Robust Training under Label Noise by
Over-parameterization", arXiv 2202.14026.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_kd.core.losses import at_least_float32, check_positive, check_shapes, check_target

__all__ = [
    "agreement_loss",
    "average_decay",
    "balance_loss",
    "complementary_loss",
    "consistency_loss",
    "corrected_cross_entropy",
    "corrected_probabilities",
    "exit_distillation_loss",
    "exit_feature_loss",
    "flag_wrong",
    "negative_loss",
    "positive_loss",
    "reweight",
    "separation_loss",
    "update_rows",
]

_FLOOR = 1e-4


def _noise(u: Tensor, v: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One-hot targets, and what ``u`` says of the given label and ``v`` of the others, ``[B, C]`` each."""
    own = F.one_hot(target, u.shape[1]).to(u.dtype)
    return own, (u.square() * own).clamp(0, 1 - _FLOOR), (v.square() * (1 - own)).clamp(0, 1 - _FLOOR)


def _check_rows(logits: Tensor, u: Tensor, v: Tensor, target: Tensor) -> None:
    check_target(logits, target)
    check_shapes(logits=(logits, "BC"), u=(u, "BC"), v=(v, "BC"))


def corrected_probabilities(logits: Tensor, u: Tensor, v: Tensor, target: Tensor) -> Tensor:
    """The softmax plus the part of a wrong label: ``softmax(logits) + u^2`` at the label ``- v^2`` elsewhere.

    Clamped to at least 1e-4, scaled to sum 1, and clamped again. No gradient reaches ``v``.

    Args:
        logits: ``[B, C]``.
        u: ``[B, C]``, the samples' rows; only the column of the given label counts.
        v: ``[B, C]``, the samples' rows; only the other columns count.
        target: int64 ``[B]``, the given labels.

    Returns:
        ``[B, C]``.
    """
    _check_rows(logits, u, v, target)
    (logits,) = at_least_float32(logits)
    _, added, taken = _noise(u, v, target)
    s = (logits.softmax(1) + added - taken.detach()).clamp_min(_FLOOR)
    return (s / s.sum(1, keepdim=True)).clamp(_FLOOR, 1)


def corrected_cross_entropy(probabilities: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """``mean_i weight_i * -log p_i[target_i]`` of corrected probabilities.

    Args:
        probabilities: ``[B, C]`` from ``corrected_probabilities``.
        target: int64 ``[B]``.
        weight: ``[B]``, not scaled to sum 1.
    """
    check_target(probabilities, target)
    check_shapes(target=(target, "B"), weight=(weight, "B"))
    return (weight * -probabilities.gather(1, target[:, None]).squeeze(1).log()).mean()


def separation_loss(logits: Tensor, u: Tensor, v: Tensor, target: Tensor) -> Tensor:
    """Mean squared norm of ``onehot(argmax logits) + u^2 at the label - v^2 elsewhere - onehot(target)``.

    Gradient reaches ``v`` alone: it learns which class stands behind a wrong label.

    Args:
        logits: ``[B, C]``; only their largest counts.
        u: ``[B, C]``.
        v: ``[B, C]``.
        target: int64 ``[B]``.
    """
    _check_rows(logits, u, v, target)
    own, added, taken = _noise(u, v, target)
    predicted = F.one_hot(logits.argmax(1), logits.shape[1]).to(own.dtype)
    return (predicted + added.detach() - taken - own).square().sum(1).mean()


def balance_loss(probabilities: Tensor) -> Tensor:
    """Cross-entropy from the uniform distribution to the batch's mean prediction; at least ``log C``.

    Args:
        probabilities: ``[B, C]``.
    """
    check_shapes(probabilities=(probabilities, "BC"))
    return -probabilities.mean(0).clamp(_FLOOR, 1).log().mean()


def consistency_loss(weak_logits: Tensor, strong_logits: Tensor) -> Tensor:
    """``mean_i KL(softmax(weak_i) || softmax(strong_i))``; gradient reaches the strong view alone.

    Args:
        weak_logits: ``[B, C]``.
        strong_logits: ``[B, C]``, of the same images.
    """
    check_shapes(weak_logits=(weak_logits, "BC"), strong_logits=(strong_logits, "BC"))
    weak, strong = at_least_float32(weak_logits.detach(), strong_logits)
    weak, strong = weak.log_softmax(1), strong.log_softmax(1)
    return (weak.exp() * (weak - strong)).sum(1).mean()


def complementary_loss(logits: Tensor, target: Tensor, predicted: Tensor, weight: Tensor) -> Tensor:
    """``mean_i weight_i * -sum_k log clamp(1 - p_ik, 1e-5, 1)``, over all classes but the label and the prediction.

    Where none are left (two classes, the prediction not the label), a sample's loss and gradient are 0.

    Args:
        logits: ``[B, C]``.
        target: int64 ``[B]``, the given labels.
        predicted: int64 ``[B]``, what the network says of each sample.
        weight: ``[B]``, not scaled to sum 1.
    """
    check_target(logits, target)
    check_target(logits, predicted, "predicted")
    check_shapes(target=(target, "B"), weight=(weight, "B"))
    (logits,) = at_least_float32(logits)
    complementary = torch.ones_like(logits).scatter(1, torch.stack([target, predicted], 1), 0.0)
    per_class = -(1 - logits.softmax(1)).clamp(1e-5, 1).log()
    return (weight * (complementary * per_class).sum(1)).mean()


def positive_loss(
    logits: Tensor,
    target: Tensor,
    u: Tensor,
    v: Tensor,
    weight: Tensor,
    rho: Tensor | float,
    consistency_weight: float = 0.9,
    balance_weight: float = 0.1,
    separation_weight: float = 50.0,
) -> Tensor:
    """What the positive head and each exit learn: corrected cross-entropy, separation, balance and consistency.

    Args:
        logits: of the weak views ``[B, C]``, or of those and then of the strong ones ``[2B, C]``.
        target: int64 ``[B]``.
        u: ``[B, C]``.
        v: ``[B, C]``.
        weight: ``[B]``.
        rho: share of wrong labels; ``separation_weight * rho^2`` weights the separation.
        consistency_weight: of the consistency of both views; nothing without strong ones.
        balance_weight: of the balance.
        separation_weight: see ``rho``.
    """
    _check_views(logits, target)
    probabilities = corrected_probabilities(logits[: len(target)], u, v, target)
    separation = separation_loss(logits[: len(target)], u, v, target)
    loss = corrected_cross_entropy(probabilities, target, weight) + separation_weight * rho**2 * separation
    return loss + _regularisers(logits, probabilities, consistency_weight, balance_weight)


def negative_loss(
    logits: Tensor,
    target: Tensor,
    predicted: Tensor,
    weight: Tensor,
    consistency_weight: float = 0.9,
    balance_weight: float = 0.1,
) -> Tensor:
    """What the negative head learns: the complementary loss, balance and consistency.

    Args:
        logits: as in ``positive_loss``.
        target: int64 ``[B]``.
        predicted: int64 ``[B]``.
        weight: ``[B]``.
        consistency_weight: of the consistency.
        balance_weight: of the balance.
    """
    _check_views(logits, target)
    (logits,) = at_least_float32(logits)
    weak = logits[: len(target)]
    loss = complementary_loss(weak, target, predicted, weight)
    return loss + _regularisers(logits, weak.softmax(1), consistency_weight, balance_weight)


def _check_views(logits: Tensor, target: Tensor) -> None:
    if logits.ndim != 2 or len(logits) not in (len(target), 2 * len(target)):
        raise ValueError(
            f"logits must be [B, C], or [2B, C] of both views, for {len(target)} targets, got {list(logits.shape)}: "
            "give the weak views first"
        )


def _regularisers(logits: Tensor, probabilities: Tensor, consistency_weight: float, balance_weight: float) -> Tensor:
    loss = balance_weight * balance_loss(probabilities)
    count = len(probabilities)
    if len(logits) == count:
        return loss
    return loss + consistency_weight * consistency_loss(logits[:count], logits[count:])


def exit_distillation_loss(exit_logits: Tensor, teacher_logits: Tensor, temperature: float = 3.0) -> Tensor:
    """``temperature^2`` times the cross-entropy of the softened exit from the softened teacher; its minimum is not 0.

    Args:
        exit_logits: ``[B, C]``.
        teacher_logits: ``[B, C]``, without gradient.
        temperature: positive.
    """
    check_shapes(exit_logits=(exit_logits, "BC"), teacher_logits=(teacher_logits, "BC"))
    check_positive(temperature=temperature)
    exit_logits, teacher_logits = at_least_float32(exit_logits, teacher_logits.detach())
    soft = (teacher_logits / temperature).softmax(1)
    return temperature**2 * -(soft * (exit_logits / temperature).log_softmax(1)).sum(1).mean()


def exit_feature_loss(exit_feature: Tensor, feature: Tensor) -> Tensor:
    """Sum of squared differences over the whole batch, where either feature is above 0; so it grows with the batch.

    Args:
        exit_feature: ``[B, D]``.
        feature: ``[B, D]`` of the network, without gradient.
    """
    check_shapes(exit_feature=(exit_feature, "BD"), feature=(feature, "BD"))
    exit_feature, feature = at_least_float32(exit_feature, feature.detach())
    active = (exit_feature > 0) | (feature > 0)
    return ((exit_feature - feature).square() * active).sum()


def agreement_loss(positive_logits: Tensor, negative_logits: Tensor) -> Tensor:
    """``p (log p - log q)`` of both heads' softmax, averaged over all ``B * C`` entries; gradient reaches both.

    Args:
        positive_logits: ``[B, C]``, of ``p``.
        negative_logits: ``[B, C]``, of ``q``.
    """
    check_shapes(positive_logits=(positive_logits, "BC"), negative_logits=(negative_logits, "BC"))
    p, q = (z.log_softmax(1) for z in at_least_float32(positive_logits, negative_logits))
    return (p.exp() * (p - q)).mean()


def reweight(probability: Tensor, threshold: float = 0.3) -> tuple[Tensor | None, float]:
    """Sample weights and the share of wrong labels, from how much the negative head believes each given label.

    Args:
        probability: ``[n]``.
        threshold: labels below it are taken for wrong.

    Returns:
        The probabilities scaled to [0, 1] by their extremes, ``[n]``, or ``None`` where they are all equal; and the
        share strictly below ``threshold``.
    """
    if probability.ndim != 1 or not len(probability):
        raise ValueError(f"probability must be [n] with n above 0, got {list(probability.shape)}: give one a sample")
    low, high = probability.min(), probability.max()
    weight = (probability - low) / (high - low) if high > low else None
    return weight, float((probability < threshold).double().mean())


def average_decay(epoch: int) -> float:
    """What stays of the averaged weights at the end of ``epoch``: ``min(0.9, (1 + epoch) / (10 + epoch))``."""
    return min(0.9, (1 + epoch) / (10 + epoch))


def flag_wrong(probability: Tensor, threshold: float = 0.05) -> Tensor:
    """Which labels are wrong, bool ``[n]``: those whose probability ``[n]`` is strictly below ``threshold``."""
    return probability < threshold


def update_rows(rows: Tensor, index: Tensor, gradient: Tensor, lr: float) -> None:
    """A step of plain gradient descent on some rows, in place; its cost does not depend on how many there are.

    Args:
        rows: ``[N, C]``.
        index: int64 ``[B]``, the rows that the gradients belong to; those of one row add up.
        gradient: ``[B, C]``; nothing is done where one entry is not finite, as a scaler skips the network's step then.
        lr: learning rate.
    """
    check_shapes(rows=(rows, "NC"), index=(index, "B"), gradient=(gradient, "BC"))
    finite = torch.where(gradient.isfinite().all(), gradient, 0.0)
    rows.index_add_(0, index, finite.to(rows.dtype), alpha=-lr)
