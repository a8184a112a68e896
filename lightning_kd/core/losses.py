"""Losses and checks of their arguments that methods of several families share."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_kd.argument_checks import check_numbers


def at_least_float32(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Half-precision tensors converted to float32; others are returned unchanged, so float64 is kept."""
    return tuple(t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in tensors)


def check_shapes(**tensors: tuple[Tensor, str]) -> None:
    """Raise if the shapes of tensors do not fit, before broadcasting hides it; values are not read.

    Args:
        tensors: by name, each with its shape in letters, as ``logits=(logits, "BC"), weight=(weight, "B")``; a letter
            is the same size in all of them.

    Raises:
        ValueError: naming the first tensor of another shape.
    """
    sizes: dict[str, int] = {}
    for name, (tensor, letters) in tensors.items():
        shape = list(tensor.shape)
        if len(shape) != len(letters) or any(sizes.get(k, n) != n for k, n in zip(letters, shape, strict=True)):
            wanted = ", ".join(str(sizes.get(letter, letter)) for letter in letters)
            raise ValueError(f"{name} must be [{wanted}], got {shape}: give tensors of one batch and the same classes")
        sizes.update(zip(letters, shape, strict=True))


def check_logits(student_logits: Tensor, teacher_logits: Tensor) -> None:
    """Raise ``ValueError`` unless both are ``[B, C]`` and of the same shape."""
    if student_logits.shape != teacher_logits.shape or student_logits.ndim != 2:
        raise ValueError(
            f"student_logits {tuple(student_logits.shape)} and teacher_logits {tuple(teacher_logits.shape)} must both "
            "be [B, C]: give both networks the same classes"
        )


def check_features(student_feature: Tensor, teacher_feature: Tensor) -> None:
    """Raise ``ValueError`` unless they are ``[N, D]`` and ``[N, D']`` with ``N`` at least 2, as relations need."""
    check_shapes(student_feature=(student_feature, "ND"), teacher_feature=(teacher_feature, "NE"))
    if len(student_feature) < 2:
        raise ValueError(
            f"student_feature must be of 2 samples or more, got {len(student_feature)}: relations need a larger batch"
        )


def check_target(logits: Tensor, target: Tensor, name: str = "target", num_classes: int | None = None) -> None:
    """Raise ``ValueError`` unless ``logits`` are ``[B, C]`` with ``C`` at least 2 and ``target`` is int64 ``[B]``.

    The range of the classes is checked on a CPU alone, as the check would make a GPU wait.

    Args:
        logits: logits or probabilities, ``[B, C]``.
        target: classes, int64 ``[B]``.
        name: name of ``target`` in the message.
        num_classes: number of classes that ``target`` may have. Default: ``C``.
    """
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(
            f"logits must be [B, C] with at least 2 classes, got {list(logits.shape)}: give one logit for each class"
        )
    if target.shape != logits.shape[:1] or target.dtype != torch.int64:
        raise ValueError(
            f"{name} must be int64 [{len(logits)}], got {target.dtype} {list(target.shape)}: give one class for each "
            "sample"
        )
    _check_range(name, target, logits.shape[1] if num_classes is None else num_classes)


def _check_range(name: str, target: Tensor, num_classes: int) -> None:
    if target.device.type == "cpu" and target.numel():
        low, high = (int(value) for value in target.aminmax())
        if low < 0 or high >= num_classes:
            raise ValueError(
                f"{name} must be between 0 and {num_classes - 1}, got {low} to {high}: correct labels or num_classes"
            )


def check_positive(**values: float | Tensor) -> None:
    """Raise ``ValueError`` naming the first argument that is not a finite number above 0.

    The value of a tensor, such as a trained temperature, is checked on a CPU alone.
    """
    for name, value in values.items():
        if not isinstance(value, Tensor):
            check_numbers({name: value}, above=0)
        elif value.numel() != 1 or value.device.type == "cpu":
            check_numbers({name: value.item() if value.numel() == 1 else value}, above=0)


def negative_learning_loss(
    logits: Tensor, complementary_target: Tensor, eps: float = 0.0, weight: Tensor | None = None
) -> Tensor:
    """Negative learning: the mean of ``-log(1 - p_k)`` over samples and classes ``k`` that the sample does not have.

    ``p`` is the softmax of ``logits``. With ``eps=0`` the loss is computed as the softplus of the logit of ``k`` minus
    the log-sum-exp of the other logits: for any finite logits it is finite, and its gradient at ``k`` is ``p_k``.

    Args:
        logits: ``[B, C]`` with C at least 2; half precision is computed in float32.
        complementary_target: int64 ``[B]``, or ``[B, M]`` for several classes of each sample, where repeats count.
        eps: ``1 - p_k`` is clamped to at least this, in [0, 1). Above 0 it bounds the loss by ``-log(eps)``, and
            clamped samples have no gradient.
        weight: float ``[B]``, a factor for each sample; the mean still divides by their number. Default: 1.

    Returns:
        A scalar.

    Raises:
        ValueError: for a wrong shape or dtype, an empty batch, ``eps`` out of range, and (checked on a CPU alone)
            classes out of range.

    Source: Kim et al., NLNL: Negative Learning for Noisy Labels, ICCV 2019, arXiv 1908.07387, equation 2.
    """
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(
            f"logits must be [B, C] with at least 2 classes, got {list(logits.shape)}: give one logit for each class"
        )
    target = complementary_target
    if target.dtype != torch.int64 or target.ndim not in (1, 2) or len(target) != len(logits) or not target.numel():
        raise ValueError(
            f"complementary_target must be int64 [B] or [B, M] for {len(logits)} samples, got {target.dtype} "
            f"{list(target.shape)}: give one class or several that each sample is not"
        )
    _check_range("complementary_target", target, logits.shape[1])
    check_numbers(least=0, below=1, remedy="give 0 for no clamp", eps=eps)
    if weight is not None:
        check_shapes(logits=(logits, "BC"), weight=(weight, "B"))
    (logits,) = at_least_float32(logits)
    target = target.reshape(len(target), -1)
    chosen = logits.gather(1, target)
    rivals = logits[:, None].expand(-1, target.shape[1], -1).scatter(2, target[:, :, None], -torch.inf).logsumexp(2)
    loss = -F.logsigmoid(rivals - chosen)
    if eps > 0:
        loss = loss.clamp(max=-math.log(eps))
    if weight is not None:
        loss = loss * weight[:, None]
    return loss.mean()


def bernoulli_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """``KL(Bern(sigmoid(teacher)) || Bern(sigmoid(student)))`` for each logit, in their shape; always finite."""
    on = teacher.sigmoid() * (F.logsigmoid(teacher) - F.logsigmoid(student))
    off = (-teacher).sigmoid() * (F.logsigmoid(-teacher) - F.logsigmoid(-student))
    return on + off


def asymmetric_loss(
    logits: Tensor,
    target: Tensor,
    gamma_negative: float = 4.0,
    gamma_positive: float = 0.0,
    margin: float = 0.05,
    detach_focus: bool = True,
    reduction: Literal["sum", "mean", "none"] = "sum",
) -> Tensor:
    """The asymmetric loss of multi-label classification: binary cross-entropy in which easy negatives count little.

    With ``p = sigmoid(logits)`` and ``q = min(1 - p + margin, 1)`` it is ``-(1 - p)^gamma_positive log p`` for labels
    that are 1 and ``-(1 - q)^gamma_negative log q`` for those that are 0. It is computed from the logits, so loss and
    gradient are finite for any logits; both are 0 for a negative with ``p <= margin``.

    Args:
        logits: ``[B, C]``; half precision is computed in float32, float64 stays.
        target: ``[B, C]`` of 1, 0 and -1 (not known: ignored).
        gamma_negative: exponent of negatives, 0 or more.
        gamma_positive: exponent of positives, 0 or more.
        margin: by how much the probabilities of negatives are lowered, in [0, 1).
        detach_focus: no gradient flows through the powers.
        reduction: ``"sum"`` or ``"mean"`` over all known labels, or ``"none"``, which gives ``[B, C]``.

    Raises:
        ValueError: for different shapes, numbers out of range, and (checked on a CPU alone) other values in ``target``.

    Source: Ridnik et al., arXiv 2009.14119, equations 4 to 7.
    """
    check_numbers(least=0, gamma_negative=gamma_negative, gamma_positive=gamma_positive)
    check_numbers(least=0, below=1, margin=margin)
    if reduction not in ("sum", "mean", "none"):
        raise ValueError(f"reduction must be 'sum', 'mean' or 'none', got {reduction!r}: give one of them")
    check_shapes(logits=(logits, "BC"), target=(target, "BC"))
    check_label_values(target, (-1, 0, 1))
    (logits,) = at_least_float32(logits)
    p, rest = logits.sigmoid(), (-logits).sigmoid()
    negative = (rest + margin).clamp(max=1).log() if margin else F.logsigmoid(-logits)
    tiny = torch.finfo(rest.dtype).tiny  # a fractional power of 0 has an infinite gradient
    focus_positive, focus_negative = rest.clamp(min=tiny) ** gamma_positive, (p - margin).clamp(min=0) ** gamma_negative
    if detach_focus:
        focus_positive, focus_negative = focus_positive.detach(), focus_negative.detach()
    positive = focus_positive * F.logsigmoid(logits)
    each = -torch.where(target > 0, positive, focus_negative * negative).masked_fill(target < 0, 0.0)
    if reduction == "none":
        return each
    return each.sum() / (target >= 0).sum().clamp(min=1) if reduction == "mean" else each.sum()


def check_label_values(target: Tensor, allowed: tuple[int, ...], name: str = "target") -> None:
    """Raise ``ValueError`` if ``target`` has other values than ``allowed``; checked on a CPU alone."""
    if target.device.type != "cpu":
        return
    wide = target.float()  # in uint8, 255 == -1 is True
    if not torch.isin(wide, torch.tensor(allowed, dtype=wide.dtype)).all():
        values = " and ".join(map(str, allowed))
        raise ValueError(
            f"{name} must hold {values}, got values from {float(wide.min()):g} to {float(wide.max()):g}: correct the "
            "labels"
        )


def soft_cross_entropy(logits: Tensor, soft_target: Tensor) -> Tensor:
    """Cross-entropy with probabilities ``y`` as target: ``-sum_k y_k log softmax(logits)_k``, mean over the batch.

    A class with ``y_k = 0`` adds 0, even if its logarithm overflows. The gradient is ``(p - y) / B`` if rows of ``y``
    sum to 1.

    Args:
        logits: ``[B, C]``; half precision is computed in float32, float64 stays.
        soft_target: ``y``, ``[B, C]``; gets no gradient.

    Returns:
        A scalar.

    Raises:
        ValueError: for different shapes.
    """
    check_shapes(logits=(logits, "BC"), soft_target=(soft_target, "BC"))
    logits, soft_target = at_least_float32(logits, soft_target.detach())
    each = (soft_target * logits.log_softmax(1)).masked_fill(soft_target == 0, 0)
    return -each.sum(1).mean()


def z_loss(
    logits: Tensor,
    target: Tensor,
    a: float = 1.0,
    b: float = 0.0,
    reduction: Literal["mean", "sum", "none"] = "mean",
    eps: float | None = None,
) -> Tensor:
    """The Z-loss ``softplus(a (b - z_target)) / a``, which does not change if a sample's logits are scaled or shifted.

    ``z = (logits - mean) / (s + eps)``, with the mean and the (biased) standard deviation ``s`` of the sample's logits,
    both with gradient. ``z_target`` is at most ``sqrt(C - 1)``, so the loss is bounded. If all logits are equal,
    ``z = 0`` without gradient: training cannot start there. It is not the penalty ``log(Z)^2`` of language models.

    Args:
        logits: ``[B, C]``, ``C >= 3``, since with two classes there is no gradient; half precision is computed in
            float32, float64 stays.
        target: int64 ``[B]``.
        a: sharpness, above 0; for large ``a`` the loss approaches ``max(0, b - z_target)``.
        b: the loss falls little once ``z_target`` is above this.
        reduction: ``"mean"``, ``"sum"``, or ``"none"``, which gives ``[B]``.
        eps: added to ``s``. Default: 1e-12 in float64, else 1e-6.

    Raises:
        ValueError: for fewer than 3 classes, a wrong shape or dtype, numbers out of range, and (checked on a CPU alone)
            logits that are not finite or a target out of range.

    Source: de Brebisson and Vincent, arXiv 1604.08859.
    """
    check_numbers(above=0, a=a)
    check_numbers(b=b)
    check_numbers(least=0, optional=True, eps=eps)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}: give one of them")
    check_target(logits, target)
    if logits.shape[1] < 3:
        raise ValueError(f"logits must be [B, C] with at least 3 classes, got {list(logits.shape)}: take cross-entropy")
    if logits.device.type == "cpu" and not logits.isfinite().all():
        raise ValueError("logits must be finite, got NaN or infinity: look at the inputs or lower the learning rate")
    (logits,) = at_least_float32(logits)
    eps = eps if eps is not None else 1e-12 if logits.dtype == torch.float64 else 1e-6
    flat = (logits == logits[:, :1]).all(1, keepdim=True)
    centred = (logits - logits.mean(1, keepdim=True)).masked_fill(flat, 0)  # before the square, for precision
    s = centred.square().mean(1, keepdim=True).masked_fill(flat, 1).sqrt()  # the gradient of sqrt(0) is infinite
    each = -F.logsigmoid(a * (centred.gather(1, target[:, None]) / (s + eps) - b)).squeeze(1) / a
    return each if reduction == "none" else each.mean() if reduction == "mean" else each.sum()
