"""The losses of relative difficulty distillation, which weigh and choose the pixels of a segmentation network.

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
    """How easy the teacher finds each pixel: ``exp(-KL(softmax(auxiliary) || softmax(main)))``, enlarged to ``size``.

    Args:
        main_logits: of the teacher ``[B, C, h, w]``; half precision is computed in float32, float64 stays.
        auxiliary_logits: of its auxiliary head, ``[B, C, h, w]``.
        size: height and width of the targets. The weight is enlarged, bilinearly with aligned corners, not the logits.

    Returns:
        The weight of each pixel, from 0 (its heads contradict each other) to 1 (they agree), ``[B, H, W]``, without
        gradient.

    Raises:
        ValueError: for logits of other shapes.

    Source: arXiv 2407.03719, teacher-full evaluated RDD.
    """
    check_shapes(main_logits=(main_logits, "BCHW"), auxiliary_logits=(auxiliary_logits, "BCHW"))
    log_main, log_auxiliary = (z.log_softmax(1) for z in at_least_float32(main_logits, auxiliary_logits))
    auxiliary = log_auxiliary.exp()
    # a class that the auxiliary head rules out counts 0, even where both logarithms overflow
    difference = (log_auxiliary - log_main).masked_fill(auxiliary == 0, 0)
    divergence = (auxiliary * difference).sum(1, keepdim=True).clamp(min=0)  # below 0 by rounding alone
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
    """The first stage: cross-entropy of both heads, each pixel with its weight.

    Args:
        student: logits ``[B, C, h, w]``, enlarged to the size of the target with aligned corners.
        student_auxiliary: likewise of the auxiliary head; ``None`` without one.
        target: int64 ``[B, H, W]``, -1 for ignored pixels.
        weight: ``[B, H, W]``, from ``relative_difficulty``; gets no gradient.
        auxiliary_weight: of the auxiliary head's cross-entropy.
        mean_over: ``"all"`` pixels, the ignored ones too, as in the official code, or the ``"valid"`` ones.

    Returns:
        Scalar.

    Raises:
        ValueError: for shapes that do not belong together, and classes out of range (which only a CPU is asked for).

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
    """The pixels that a network finds hard: whose true class has a probability of ``threshold`` or less.

    Where these are fewer than ``min_kept``, the threshold rises to the ``min_kept``-th smallest probability of the
    batch. Ignored pixels take part in that with probability 1, so that with fewer valid ones than ``min_kept`` all
    valid ones are hard.

    Args:
        logits: ``[B, C, H, W]``; half precision is computed in float32.
        target: int64 ``[B, H, W]``, -1 for ignored pixels.
        threshold: from 0 to 1.
        min_kept: how many pixels of the batch; a fraction from 0.0 to 1.0 is a share of all pixels; 0 for none.

    Returns:
        bool ``[B, H, W]``, ``False`` at ignored pixels.

    Raises:
        ValueError: for other shapes or numbers, and classes out of range (which only a CPU is asked for).

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
    if kept:  # selected, not sorted
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
    """The pixels of the second stage, bool ``[B, H, W]``, from those that student and teacher find hard.

    Args:
        student: logits ``[B, C, h, w]``, enlarged to the size of the target with aligned corners.
        teacher: likewise.
        target: int64 ``[B, H, W]``, -1 for ignored pixels.
        rule: ``"xor"``: hard for one of them alone; ``"or"``; ``"and"``; or ``"student"``: hard for the student.
        threshold: see ``hard_pixels``, as ``min_kept``.
        min_kept: likewise.

    Raises:
        ValueError: for another rule, and as in ``hard_pixels``.
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
    """The second stage: cross-entropy at the pixels that student and teacher dispute, for each pair of heads by itself.

    A head's cross-entropy is the sum over its pixels divided by the sum of their class weights; 0, with a graph, where
    it has none.

    Args:
        student: logits ``[B, C, h, w]``, enlarged to the size of the target with aligned corners.
        student_auxiliary: likewise of its auxiliary head; ``None`` without one.
        teacher: logits of the teacher; gets no gradient.
        teacher_auxiliary: of its auxiliary head. Without one the student's teaches nothing, but with ``"student"``.
        target: int64 ``[B, H, W]``, -1 for ignored pixels.
        rule: see ``disputed_pixels``.
        threshold: see ``hard_pixels``, as ``min_kept``: of the pixels in this process's batch.
        min_kept: likewise.
        class_weight: ``C`` numbers from 0 on. Default: 1 for each.
        auxiliary_weight: of the auxiliary heads' loss.

    Returns:
        Scalar.

    Raises:
        ValueError: for shapes that do not belong together, another rule, other numbers, and classes out of range (which
            only a CPU is asked for).

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
    """Of each pixel, 0 at ignored ones."""
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
    """A count, or a share of ``whole``, rounded down; ``name`` is that of the argument.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(given, Integral) and not isinstance(given, bool):
        check_numbers({name: given}, least=0)
        return int(given)
    check_numbers({name: given}, least=0, most=1, remedy="give a whole number, or a share from 0.0 to 1.0")
    return int(given * whole + 1e-9)
