"""The loss functions of BLDR on logits ``[B, C]``; half precision is computed in float32.

All return a scalar unless they say otherwise. All raise ``ValueError`` if shapes do not match, if targets are not
int64, or, checked on a CPU only, if targets are out of range.

Source of all: Zong et al., "Noise-Robust Bidirectional Learning with Dynamic Sample Reweighting", arXiv 2209.01334. The
noise variables ``u`` and ``v`` are those of Liu et al., "Robust Training under Label Noise by Over-parameterization",
arXiv 2202.14026.

Source of all: Zong et al., "Noise-Robust Bidirectional Learning with Dynamic Sample Reweighting", arXiv 2209.01334; the
separate noise variables ``u`` and ``v`` are those of Liu et al., "Robust Training under Label Noise by
Over-parameterization", arXiv 2202.14026.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_kd.core.losses import at_least_float32, check_positive, check_shapes, check_target
from lightning_kd.noisy_labels.bldr_rules import average_decay, flag_wrong, reweight, update_rows

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


def _noise_terms(u: Tensor, v: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One-hot targets, ``u^2`` at the given label and ``v^2`` at the other classes, each ``[B, C]``."""
    u, v = at_least_float32(u, v)
    own = F.one_hot(target, u.shape[1]).to(u.dtype)
    return own, (u.square() * own).clamp(0, 1 - _FLOOR), (v.square() * (1 - own)).clamp(0, 1 - _FLOOR)


def _check_rows(logits: Tensor, u: Tensor, v: Tensor, target: Tensor) -> None:
    check_target(logits, target)
    check_shapes(logits=(logits, "BC"), u=(u, "BC"), v=(v, "BC"))


def corrected_probabilities(logits: Tensor, u: Tensor, v: Tensor, target: Tensor) -> Tensor:
    """Softmax corrected by the modelled label noise: ``softmax(logits) + u^2`` at the label, ``- v^2`` elsewhere.

    If the given label is wrong, ``u`` grows and explains the label, so that the softmax need not. The result is clamped
    to at least 1e-4, divided by its sum, and clamped again. ``v`` gets no gradient.

    Args:
        logits: ``[B, C]``.
        u: ``[B, C]``, stored values of the samples; only the column of the given label is used.
        v: ``[B, C]``, stored values of the samples; only the other columns are used.
        target: int64 ``[B]``, the given labels.

    Returns:
        ``[B, C]``.

    Raises:
        ValueError: see the module.
    """
    _check_rows(logits, u, v, target)
    (logits,) = at_least_float32(logits)
    _, added, taken = _noise_terms(u, v, target)
    s = (logits.softmax(1) + added - taken.detach()).clamp_min(_FLOOR)
    return (s / s.sum(1, keepdim=True)).clamp(_FLOOR, 1)


def corrected_cross_entropy(probabilities: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Weighted cross-entropy of corrected probabilities: ``mean_i weight_i * -log p_i[target_i]``.

    Args:
        probabilities: ``[B, C]`` from ``corrected_probabilities``.
        target: int64 ``[B]``.
        weight: ``[B]``, weights of the samples; they are not normalised.

    Raises:
        ValueError: see the module.
    """
    check_target(probabilities, target)
    check_shapes(target=(target, "B"), weight=(weight, "B"))
    probabilities, weight = at_least_float32(probabilities, weight)
    return (weight * -probabilities.gather(1, target[:, None]).squeeze(1).log()).mean()


def separation_loss(logits: Tensor, u: Tensor, v: Tensor, target: Tensor) -> Tensor:
    """Mean squared norm of ``onehot(argmax logits) + u^2 at the label - v^2 elsewhere - onehot(target)``.

    Only ``v`` gets gradient: it learns which class a wrongly labelled sample has instead.

    Args:
        logits: ``[B, C]``; only their argmax is used.
        u: ``[B, C]``, see ``corrected_probabilities``.
        v: ``[B, C]``, see ``corrected_probabilities``.
        target: int64 ``[B]``, the given labels.

    Raises:
        ValueError: see the module.
    """
    _check_rows(logits, u, v, target)
    own, added, taken = _noise_terms(u, v, target)
    predicted = F.one_hot(logits.argmax(1), logits.shape[1]).to(own.dtype)
    return (predicted + added.detach() - taken - own).square().sum(1).mean()


def balance_loss(probabilities: Tensor) -> Tensor:
    """Cross-entropy between the uniform distribution and the batch's mean prediction; at least ``log C``.

    Args:
        probabilities: ``[B, C]``, at least 1e-4 where they enter the logarithm.

    Raises:
        ValueError: see the module.
    """
    check_shapes(probabilities=(probabilities, "BC"))
    (probabilities,) = at_least_float32(probabilities)
    return -probabilities.mean(0).clamp(_FLOOR, 1).log().mean()


def consistency_loss(weak_logits: Tensor, strong_logits: Tensor) -> Tensor:
    """``mean_i KL(softmax(weak_i) || softmax(strong_i))``; only the strong view gets gradient.

    Args:
        weak_logits: ``[B, C]``, logits of the weak views.
        strong_logits: ``[B, C]``, logits of the strong views of the same images.

    Raises:
        ValueError: see the module.
    """
    check_shapes(weak_logits=(weak_logits, "BC"), strong_logits=(strong_logits, "BC"))
    weak, strong = at_least_float32(weak_logits.detach(), strong_logits)
    weak, strong = weak.log_softmax(1), strong.log_softmax(1)
    return (weak.exp() * (weak - strong)).sum(1).mean()


def complementary_loss(logits: Tensor, target: Tensor, predicted: Tensor, weight: Tensor) -> Tensor:
    """``mean_i weight_i * -sum_k log clamp(1 - p_ik, 1e-5, 1)`` over all classes except label and prediction.

    If no class is left (two classes, prediction and label differ), loss and gradient of the sample are 0.

    Args:
        logits: ``[B, C]``.
        target: int64 ``[B]``, the given labels.
        predicted: int64 ``[B]``, the network's predictions.
        weight: ``[B]``, weights of the samples; they are not normalised.

    Raises:
        ValueError: see the module.
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
    """Loss of the positive head and of each exit: corrected cross-entropy, separation, balance and consistency.

    Args:
        logits: ``[B, C]`` of the weak views, or ``[2B, C]`` of the weak views followed by the strong ones.
        target: int64 ``[B]``, the given labels.
        u: ``[B, C]``, see ``corrected_probabilities``.
        v: ``[B, C]``, see ``corrected_probabilities``.
        weight: ``[B]``, weights of the samples.
        rho: share of wrong labels; the separation loss has the weight ``separation_weight * rho^2``.
        consistency_weight: weight of the consistency loss; unused without strong views.
        balance_weight: weight of the balance loss.
        separation_weight: see ``rho``.

    Raises:
        ValueError: see the module.
    """
    _check_views(logits, target)
    probabilities = corrected_probabilities(logits[: len(target)], u, v, target)
    separation = separation_loss(logits[: len(target)], u, v, target)
    loss = corrected_cross_entropy(probabilities, target, weight) + separation_weight * rho**2 * separation
    return loss + _balance_and_consistency(logits, probabilities, consistency_weight, balance_weight)


def negative_loss(
    logits: Tensor,
    target: Tensor,
    predicted: Tensor,
    weight: Tensor,
    consistency_weight: float = 0.9,
    balance_weight: float = 0.1,
) -> Tensor:
    """Loss of the negative head: complementary loss, balance and consistency.

    Args:
        logits: see ``positive_loss``.
        target: int64 ``[B]``, the given labels.
        predicted: int64 ``[B]``, the network's predictions.
        weight: ``[B]``, weights of the samples.
        consistency_weight: weight of the consistency loss; unused without strong views.
        balance_weight: weight of the balance loss.

    Raises:
        ValueError: see the module.
    """
    _check_views(logits, target)
    (logits,) = at_least_float32(logits)
    weak = logits[: len(target)]
    loss = complementary_loss(weak, target, predicted, weight)
    return loss + _balance_and_consistency(logits, weak.softmax(1), consistency_weight, balance_weight)


def _check_views(logits: Tensor, target: Tensor) -> None:
    if logits.ndim != 2 or len(logits) not in (len(target), 2 * len(target)):
        raise ValueError(
            f"logits must be [B, C], or [2B, C] of both views, for {len(target)} targets, got {list(logits.shape)}: "
            "give the weak views first"
        )


def _balance_and_consistency(
    logits: Tensor, probabilities: Tensor, consistency_weight: float, balance_weight: float
) -> Tensor:
    loss = balance_weight * balance_loss(probabilities)
    count = len(probabilities)
    if len(logits) == count:
        return loss
    return loss + consistency_weight * consistency_loss(logits[:count], logits[count:])


def exit_distillation_loss(exit_logits: Tensor, teacher_logits: Tensor, temperature: float = 3.0) -> Tensor:
    """``temperature^2`` times the cross-entropy of the exit with the teacher's probabilities, both at ``temperature``.

    Its minimum is the entropy of the teacher, not 0.

    Args:
        exit_logits: ``[B, C]``.
        teacher_logits: ``[B, C]``; gets no gradient.
        temperature: above 0.

    Raises:
        ValueError: see the module; also for a temperature that is not above 0.
    """
    check_shapes(exit_logits=(exit_logits, "BC"), teacher_logits=(teacher_logits, "BC"))
    check_positive(temperature=temperature)
    exit_logits, teacher_logits = at_least_float32(exit_logits, teacher_logits.detach())
    soft = (teacher_logits / temperature).softmax(1)
    return temperature**2 * -(soft * (exit_logits / temperature).log_softmax(1)).sum(1).mean()


def exit_feature_loss(exit_feature: Tensor, feature: Tensor) -> Tensor:
    """Sum over the batch of squared differences where either feature is above 0; it grows with the batch size.

    Args:
        exit_feature: ``[B, D]``, features of the exit.
        feature: ``[B, D]``, features of the network; gets no gradient.

    Raises:
        ValueError: see the module.
    """
    check_shapes(exit_feature=(exit_feature, "BD"), feature=(feature, "BD"))
    exit_feature, feature = at_least_float32(exit_feature, feature.detach())
    active = (exit_feature > 0) | (feature > 0)
    return ((exit_feature - feature).square() * active).sum()


def agreement_loss(positive_logits: Tensor, negative_logits: Tensor) -> Tensor:
    """``p (log p - log q)`` of both heads' softmax, averaged over all ``B * C`` entries; both heads get gradient.

    Args:
        positive_logits: ``[B, C]``, logits of ``p``.
        negative_logits: ``[B, C]``, logits of ``q``.

    Raises:
        ValueError: see the module.
    """
    check_shapes(positive_logits=(positive_logits, "BC"), negative_logits=(negative_logits, "BC"))
    p, q = (z.log_softmax(1) for z in at_least_float32(positive_logits, negative_logits))
    return (p.exp() * (p - q)).mean()
