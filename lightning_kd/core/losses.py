"""Numeric parts that losses of several families share."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_kd.argument_checks import check_numbers


def at_least_float32(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Half-precision tensors as float32, others as they are: losses keep float64 when they are given it."""
    return tuple(t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in tensors)


def check_shapes(**tensors: tuple[Tensor, str]) -> None:
    """Refuse tensors that do not belong together, before they are broadcast: a look at shapes alone, no device waits.

    Args:
        tensors: by name, each with its shape in letters, as ``logits=(logits, "BC"), weight=(weight, "B")``; a letter
            stands for one size in all of them.

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
    """Raise ``ValueError`` unless both are ``[B, C]`` of one shape."""
    if student_logits.shape != teacher_logits.shape or student_logits.ndim != 2:
        raise ValueError(
            f"student_logits {tuple(student_logits.shape)} and teacher_logits {tuple(teacher_logits.shape)} must both "
            "be [B, C]: give both networks the same classes"
        )


def check_features(student_feature: Tensor, teacher_feature: Tensor) -> None:
    """Raise ``ValueError`` unless they are ``[N, D]`` and ``[N, D']`` of two samples or more, which have a relation."""
    check_shapes(student_feature=(student_feature, "ND"), teacher_feature=(teacher_feature, "NE"))
    if len(student_feature) < 2:
        raise ValueError(
            f"student_feature must be of 2 samples or more, got {len(student_feature)}: relations need a larger batch"
        )


def check_target(logits: Tensor, target: Tensor, name: str = "target", num_classes: int | None = None) -> None:
    """Raise ``ValueError`` unless ``logits`` are ``[B, C]`` of 2 classes or more and ``target`` is int64 ``[B]``.

    Whether labels are out of range is looked at on a CPU only: a GPU would have to wait.

    Args:
        logits: or probabilities, ``[B, C]``.
        target: classes.
        name: of ``target`` in the message.
        num_classes: how many classes ``target`` may name. Default: ``C``.
    """
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(f"logits must be [B, C] with at least 2 classes, got {list(logits.shape)}: one logit a class")
    if target.shape != logits.shape[:1] or target.dtype != torch.int64:
        raise ValueError(
            f"{name} must be int64 [{len(logits)}], got {target.dtype} {list(target.shape)}: give one class a sample"
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
    """Raise ``ValueError`` naming the first argument that is no finite number above 0.

    A tensor, such as a temperature that is learnt, is looked at on a CPU only.
    """
    for name, value in values.items():
        if not isinstance(value, Tensor):
            check_numbers({name: value}, above=0)
        elif value.numel() != 1 or value.device.type == "cpu":
            check_numbers({name: value.item() if value.numel() == 1 else value}, above=0)


def negative_learning_loss(
    logits: Tensor, complementary_target: Tensor, eps: float = 0.0, weight: Tensor | None = None
) -> Tensor:
    """Learning from what a sample is not: the mean of ``-log(1 - p_k)`` over samples and complementary classes ``k``.

    ``p`` is the softmax of ``logits``. Kim et al., "NLNL: Negative Learning for Noisy Labels", arXiv:1908.07387,
    equation 2. With ``eps=0`` the loss is the softplus of how far ``k`` is above the log-sum-exp of the other classes:
    finite, and its gradient at ``k`` is ``p_k``, for any finite logits.

    Args:
        logits: ``[B, C]`` with C at least 2; half precision is computed in float32.
        complementary_target: int64 ``[B]``, or ``[B, M]`` for several classes of each sample, repeats counted.
        eps: 0, or the value that ``1 - p_k`` is clamped to from below, which bounds the loss by ``-log(eps)`` and
            leaves no gradient where it acts; in [0, 1).
        weight: float ``[B]``, a factor for each sample; the mean still divides by their number. Default: 1.

    Returns:
        A scalar.

    Raises:
        ValueError: for another shape or dtype, an empty batch, ``eps`` out of range, and for classes out of range
            (which only a CPU is asked for).
    """
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(f"logits must be [B, C] with at least 2 classes, got {list(logits.shape)}")
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
    """``KL(Bern(sigmoid(teacher)) || Bern(sigmoid(student)))`` of each logit, finite for any; of the shape of both."""
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
    """Binary cross-entropy that lets go of easy negatives: the asymmetric loss of several labels an image.

    With ``p = sigmoid(logits)`` and ``q = min(1 - p + margin, 1)``: ``-(1 - p)^gamma_positive log p`` where the target
    is 1, ``-(1 - q)^gamma_negative log q`` where it is 0. It is computed from the logits, so that loss and gradient are
    finite for any of them; a negative with ``p <= margin`` has neither.

    Args:
        logits: ``[B, C]``; half precision is computed in float32, float64 stays.
        target: ``[B, C]`` of 1, 0 and -1 (not known: counts nothing).
        gamma_negative: exponent of negatives, 0 or more.
        gamma_positive: exponent of positives, 0 or more.
        margin: by which probabilities of negatives are lowered, in [0, 1).
        detach_focus: let no gradient go through the powers.
        reduction: over all labels that are known; ``"none"`` gives ``[B, C]``.

    Raises:
        ValueError: for shapes that differ, numbers out of range, and a target of other values (which only a CPU is
            asked for).

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
    tiny = torch.finfo(rest.dtype).tiny  # the root of 0 has no slope
    focus_positive, focus_negative = rest.clamp(min=tiny) ** gamma_positive, (p - margin).clamp(min=0) ** gamma_negative
    if detach_focus:
        focus_positive, focus_negative = focus_positive.detach(), focus_negative.detach()
    positive = focus_positive * F.logsigmoid(logits)
    each = -torch.where(target > 0, positive, focus_negative * negative).masked_fill(target < 0, 0.0)
    if reduction == "none":
        return each
    return each.sum() / (target >= 0).sum().clamp(min=1) if reduction == "mean" else each.sum()


def check_label_values(target: Tensor, allowed: tuple[int, ...], name: str = "target") -> None:
    """Raise ``ValueError`` where ``target`` holds other values; a GPU, which would have to wait, is not asked."""
    if target.device.type != "cpu":
        return
    wide = target.float()  # or 255 of uint8 would equal -1
    if not torch.isin(wide, torch.tensor(allowed, dtype=wide.dtype)).all():
        values = " and ".join(map(str, allowed))
        raise ValueError(
            f"{name} must hold {values}, got values from {float(wide.min()):g} to {float(wide.max()):g}: correct the "
            "labels"
        )


def soft_cross_entropy(logits: Tensor, soft_target: Tensor) -> Tensor:
    """``-sum_k y_k log softmax(logits)_k``, mean over the batch: cross-entropy with probabilities ``y`` as target.

    A class with ``y_k = 0`` counts 0, even where its logarithm overflows. Gradient: ``(p - y) / B`` if rows sum to 1.

    Args:
        logits: ``[B, C]``; half precision is computed in float32, float64 stays.
        soft_target: ``[B, C]``; gets no gradient.

    Raises:
        ValueError: for shapes that differ.
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
    """The Z-loss ``softplus(a (b - z_target)) / a``, which scaling and shifting a sample's logits leaves as it is.

    ``z = (logits - mean) / (s + eps)`` with the mean and the standard deviation ``s`` of the sample's own logits,
    dividing by ``C``, both with gradient. ``z_target`` is at most ``sqrt(C - 1)``, so that the loss is bounded. Logits
    that are all equal have ``z = 0`` and no gradient: training cannot start from them. It is not the penalty
    ``log(Z)^2`` of language models.

    Args:
        logits: ``[B, C]``, ``C >= 3``: with two classes there is no gradient; half precision is computed in float32,
            float64 stays.
        target: int64 ``[B]``.
        a: sharpness, above 0; for large ones the loss approaches ``max(0, b - z_target)``.
        b: how far ``z_target`` is still pushed.
        reduction: ``"none"`` gives ``[B]``.
        eps: added to ``s``. Default: 1e-12 in float64, else 1e-6.

    Raises:
        ValueError: for fewer classes, another shape or dtype, numbers out of range, and logits that are not finite and
            a target out of range (which only a CPU is asked for).

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
    centred = (logits - logits.mean(1, keepdim=True)).masked_fill(flat, 0)  # before the square, or precision is lost
    s = centred.square().mean(1, keepdim=True).masked_fill(flat, 1).sqrt()  # the root of 0 has no slope
    each = -F.logsigmoid(a * (centred.gather(1, target[:, None]) / (s + eps) - b)).squeeze(1) / a
    return each if reduction == "none" else each.mean() if reduction == "mean" else each.sum()
