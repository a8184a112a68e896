"""The losses of RDD, which weight and select pixels for training a segmentation network.

Dong Liang, Yue Sun, Yun Du, Songcan Chen, Sheng-Jun Huang. Relative Difficulty Distillation for Semantic Segmentation.
2024, arXiv 2407.03719.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.losses import at_least_float32, check_shapes
from lightning_kd.core.outputs import resized

Rule = Literal["xor", "or", "and", "student"]
RULES = ("xor", "or", "and", "student")


@torch.no_grad()
def relative_difficulty(main_logits: Tensor, auxiliary_logits: Tensor, size: Sequence[int]) -> Tensor:
    """How easy each pixel is for the teacher: ``exp(-KL(softmax(auxiliary) || softmax(main)))``, enlarged to ``size``.

    Args:
        main_logits: ``[B, C, h, w]``, the teacher's main head; half precision is computed in float32, float64 stays.
        auxiliary_logits: ``[B, C, h, w]``, the teacher's auxiliary head.
        size: height and width of the targets. The weights are enlarged (bilinearly, aligned corners), not the logits.

    Returns:
        ``[B, H, W]``, the weight of each pixel from 0 (the heads contradict each other) to 1 (they agree), no gradient.

    Raises:
        ValueError: if the shapes do not match.

    Source: arXiv 2407.03719, teacher-full evaluated RDD.
    """
    check_shapes(main_logits=(main_logits, "BCHW"), auxiliary_logits=(auxiliary_logits, "BCHW"))
    log_main, log_auxiliary = (z.log_softmax(1) for z in at_least_float32(main_logits, auxiliary_logits))
    auxiliary = log_auxiliary.exp()
    # a class of probability 0 for the auxiliary head counts 0, even if both logarithms overflow
    difference = (log_auxiliary - log_main).masked_fill(auxiliary == 0, 0)
    divergence = (auxiliary * difference).sum(1, keepdim=True).clamp(min=0)  # rounding may make it negative
    return resized((-divergence).exp(), size, align_corners=True)[:, 0]


def easy_first_loss(
    student: Tensor,
    student_auxiliary: Tensor | None,
    target: Tensor,
    weight: Tensor,
    *,
    auxiliary_weight: float = 0.4,
    mean_over: Literal["all", "valid"] = "all",
) -> Tensor:
    """The loss of the first stage: weighted cross-entropy of both heads.

    Args:
        student: logits ``[B, C, h, w]``; they are enlarged to the size of the target with aligned corners.
        student_auxiliary: logits of the auxiliary head, likewise; ``None`` without one.
        target: int64 ``[B, H, W]``, -1 for ignored pixels.
        weight: ``[B, H, W]``, weight of each pixel, from ``relative_difficulty``; gets no gradient.
        auxiliary_weight: weight of the auxiliary head's cross-entropy.
        mean_over: ``"all"``: mean over all pixels, including ignored ones, as in the official code; ``"valid"``: mean
            over valid pixels.

    Returns:
        Scalar.

    Raises:
        ValueError: if the shapes do not match, ``mean_over`` is unknown, or a class is out of range (checked on a CPU
            only).

    Source: arXiv 2407.03719, teacher-full evaluated RDD; the mean as in the official code.
    """
    if mean_over not in ("all", "valid"):
        raise ValueError(f"mean_over must be 'all' or 'valid', got {mean_over!r}: give one of them")
    check_shapes(target=(target, "BHW"), weight=(weight, "BHW"))
    each = _each_cross_entropy(_enlarged(student, target, "student"), target)
    if student_auxiliary is not None:
        auxiliary = _enlarged(student_auxiliary, target, "student_auxiliary")
        each = each + auxiliary_weight * _each_cross_entropy(auxiliary, target)
    count = target.numel() if mean_over == "all" else (target >= 0).sum().clamp(min=1)
    return (each * weight.detach()).sum() / count


@torch.no_grad()
def hard_pixels(logits: Tensor, target: Tensor, threshold: float = 0.7, min_kept: int | float = 100_000) -> Tensor:
    """The pixels that are hard for a network: the true class has a probability of at most ``threshold``.

    If these are fewer than ``min_kept``, the threshold is raised to the ``min_kept``-th smallest probability in the
    batch. Ignored pixels count with probability 1, so with fewer valid pixels than ``min_kept`` all valid ones are
    hard.

    Args:
        logits: ``[B, C, H, W]``; half precision is computed in float32.
        target: int64 ``[B, H, W]``, -1 for ignored pixels.
        threshold: from 0 to 1.
        min_kept: smallest number of hard pixels in the batch, or a share of all pixels from 0.0 to 1.0; 0 for no
            minimum.

    Returns:
        bool ``[B, H, W]``, ``False`` at ignored pixels.

    Raises:
        ValueError: if a shape is wrong, an argument is out of range, or a class is out of range (checked on a CPU
            only).

    Source: arXiv 2407.03719, and online hard example mining as in its official code.
    """
    check_numbers(least=0, most=1, threshold=threshold)
    _check_pixels(logits, target, "logits", "BCHW")
    (logits,) = at_least_float32(logits)
    valid = target >= 0
    probability = logits.softmax(1).gather(1, target.clamp(min=0)[:, None])[:, 0].masked_fill(~valid, 1.0)
    limit = probability.new_tensor(threshold)
    pixels = probability.numel()
    kept = min(count_of(min_kept, pixels, "min_kept"), pixels)
    if kept:  # kthvalue needs no full sort
        limit = torch.maximum(limit, probability.flatten().kthvalue(kept).values)
    return valid & (probability <= limit)


@torch.no_grad()
def disputed_pixels(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    rule: Rule = "xor",
    threshold: float = 0.7,
    min_kept: int | float = 100_000,
) -> Tensor:
    """The pixels of the second stage, bool ``[B, H, W]``, from the pixels that student and teacher find hard.

    Args:
        student: logits ``[B, C, h, w]``; they are enlarged to the size of the target with aligned corners.
        teacher: logits of the teacher, likewise.
        target: int64 ``[B, H, W]``, -1 for ignored pixels.
        rule: which pixels are selected: hard for exactly one network (``"xor"``), for at least one (``"or"``), for both
            (``"and"``), or for the student (``"student"``).
        threshold: see ``hard_pixels``.
        min_kept: see ``hard_pixels``.

    Raises:
        ValueError: if ``rule`` is unknown, and see ``hard_pixels``.
    """
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(map(repr, RULES))}, got {rule!r}: give one of them")
    own = hard_pixels(_enlarged(student, target, "student"), target, threshold, min_kept)
    if rule == "student":
        return own
    other = hard_pixels(_enlarged(teacher, target, "teacher"), target, threshold, min_kept)
    return own ^ other if rule == "xor" else own | other if rule == "or" else own & other


def disputed_loss(
    student: Tensor,
    student_auxiliary: Tensor | None,
    teacher: Tensor,
    teacher_auxiliary: Tensor | None,
    target: Tensor,
    rule: Rule = "xor",
    threshold: float = 0.7,
    min_kept: int | float = 100_000,
    class_weight: Tensor | Sequence[float] | None = None,
    *,
    auxiliary_weight: float = 0.4,
) -> Tensor:
    """The loss of the second stage: cross-entropy at the pixels from ``disputed_pixels``, for each pair of heads.

    The cross-entropy of a head is the sum over its pixels divided by the sum of their class weights; 0 (with a graph)
    without any pixel.

    Args:
        student: logits ``[B, C, h, w]``; they are enlarged to the size of the target with aligned corners.
        student_auxiliary: logits of the student's auxiliary head, likewise; ``None`` without one.
        teacher: logits of the teacher, likewise; gets no gradient.
        teacher_auxiliary: logits of the teacher's auxiliary head. If it is ``None``, the student's auxiliary head is
            trained only with ``rule="student"``.
        target: int64 ``[B, H, W]``, -1 for ignored pixels.
        rule: see ``disputed_pixels``.
        threshold: see ``hard_pixels``.
        min_kept: see ``hard_pixels``; it counts pixels of this process's batch.
        class_weight: weights of the ``C`` classes, at least 0. Default: 1 for each.
        auxiliary_weight: weight of the auxiliary heads' loss.

    Returns:
        Scalar.

    Raises:
        ValueError: if the shapes do not match, an argument is out of range, or a class is out of range (checked on a
            CPU only).

    Source: arXiv 2407.03719, teacher-student evaluated RDD.
    """
    weight = _class_weight(class_weight, student)
    large = _enlarged(student, target, "student")
    where = disputed_pixels(large, teacher, target, rule, threshold, min_kept)
    loss = _masked_cross_entropy(large, target, where, weight)
    if student_auxiliary is None:
        return loss
    if teacher_auxiliary is None and rule != "student":
        return loss + 0.0 * student_auxiliary.sum()
    other = student_auxiliary if teacher_auxiliary is None else teacher_auxiliary
    large = _enlarged(student_auxiliary, target, "student_auxiliary")
    where = disputed_pixels(large, other, target, rule, threshold, min_kept)
    return loss + auxiliary_weight * _masked_cross_entropy(large, target, where, weight)


def _enlarged(logits: Tensor, target: Tensor, name: str) -> Tensor:
    _check_pixels(logits, target, name, "BChw")
    return resized(at_least_float32(logits)[0], target.shape[-2:], align_corners=True)


def _check_pixels(logits: Tensor, target: Tensor, name: str, letters: str) -> None:
    check_shapes(**{name: (logits, letters), "target": (target, "BHW")})
    if target.dtype != torch.int64:
        raise ValueError(f"target must be int64, got {target.dtype}: take target.long()")
    if target.device.type == "cpu" and target.numel():
        low, high = (int(value) for value in target.aminmax())
        if low < -1 or high >= logits.shape[1]:
            raise ValueError(
                f"target must be between -1 (ignored) and {logits.shape[1] - 1}, got {low} to {high}: map what is to "
                "be ignored to -1, and correct other labels"
            )


def _each_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of each pixel, 0 for ignored ones."""
    return F.cross_entropy(logits, target, ignore_index=-1, reduction="none")


def _masked_cross_entropy(logits: Tensor, target: Tensor, where: Tensor, weight: Tensor | None) -> Tensor:
    kept = target.masked_fill(~where, -1)
    total = F.cross_entropy(logits, kept, weight, ignore_index=-1, reduction="sum")
    count = where.sum() if weight is None else (weight[target.clamp(min=0)] * where).sum()
    return total / torch.where(count > 0, count, 1)


def _class_weight(given: Tensor | Sequence[float] | None, logits: Tensor) -> Tensor | None:
    if given is None:
        return None
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    weight = torch.as_tensor(given, dtype=dtype, device=logits.device)
    if weight.shape != (logits.shape[1],):
        raise ValueError(f"class_weight needs {logits.shape[1]} numbers, one a class, got {list(weight.shape)}")
    return weight


def count_of(given: int | float, whole: int, name: str) -> int:
    """A count, or a share of ``whole`` converted to a count (rounded down); ``name`` is used in the error.

    Raises:
        ValueError: if it is neither a whole number of at least 0 nor a share from 0.0 to 1.0.
    """
    if isinstance(given, Integral) and not isinstance(given, bool):
        check_numbers({name: given}, least=0)
        return int(given)
    check_numbers({name: given}, least=0, most=1, remedy="give a whole number, or a share from 0.0 to 1.0")
    return int(given * whole + 1e-9)
