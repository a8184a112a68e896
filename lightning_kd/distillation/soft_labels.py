"""Compressed soft labels: the most probable class, or a few of the most probable ones with their probabilities.

Zhiqiang Shen, Eric Xing. A Fast Knowledge Distillation Framework for Visual Recognition. ECCV 2022, arXiv 2112.01528.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.losses import at_least_float32, check_shapes

__all__ = ["SoftLabels", "compress", "kept_classes", "recover"]

_KINDS = re.compile(r"hard|smoothing|marginal_(?:smoothing|renorm)_k([1-9]\d*)")


class SoftLabels(NamedTuple):
    """Compressed probabilities of ``B`` images.

    Attributes:
        index: int64 ``[B, k]``, the most probable classes in descending order.
        probability: float ``[B, k]``, their probabilities; ``None`` for the kind ``"hard"``.
    """

    index: Tensor  # type: ignore[assignment]  # replaces tuple.index
    probability: Tensor | None


def kept_classes(kind: str, num_classes: int | None = None, argument: str = "kind") -> int:
    """The number of classes per image that a kind of soft label keeps.

    Args:
        kind: ``"hard"``, ``"smoothing"``, ``"marginal_smoothing_kN"`` or ``"marginal_renorm_kN"`` with a number ``N``.
        num_classes: number of classes, which must be above ``N``. Default: not checked.
        argument: name of the argument ``kind`` in messages.

    Returns:
        ``N``, or 1 for the first two kinds.

    Raises:
        ValueError: if ``kind`` is unknown, or ``N`` is not below ``num_classes``.
    """
    found = _KINDS.fullmatch(kind) if isinstance(kind, str) else None
    if found is None:
        raise ValueError(
            f"{argument} must be 'hard', 'smoothing', 'marginal_smoothing_kN' or 'marginal_renorm_kN' with N such as "
            f"5, got {kind!r}: give one of them"
        )
    kept = int(found[1] or 1)
    if num_classes is not None and kept >= num_classes:
        raise ValueError(
            f"{argument} {kind!r} keeps {kept} classes, which must be fewer than the {num_classes} there are: "
            "keep fewer, or store the logits themselves"
        )
    return kept


def compress(probabilities: Tensor, kind: str) -> SoftLabels:
    """Keep only the part of a teacher's probabilities that a kind of soft label needs.

    Args:
        probabilities: ``[B, C]``, rows with sum 1; half precision is computed in float32, float64 stays.
        kind: ``"hard"``: the most probable class; ``"smoothing"``: this class and its probability;
            ``"marginal_smoothing_kN"`` and ``"marginal_renorm_kN"``: the ``N`` most probable classes and their
            probabilities.

    Returns:
        ``SoftLabels`` with ``k = 1`` or ``k = N``.

    Raises:
        ValueError: if the shape is wrong, or ``kind`` is unknown or keeps as many classes as there are.

    Source: arXiv 2112.01528, section 3.
    """
    check_shapes(probabilities=(probabilities, "BC"))
    top = at_least_float32(probabilities)[0].topk(kept_classes(kind, probabilities.shape[1]), dim=1)
    return SoftLabels(top.indices, None if kind == "hard" else top.values)


def recover(stored: SoftLabels, kind: str, num_classes: int) -> Tensor:
    """Probabilities of all classes from ``SoftLabels``: ``[B, C]``, rows with sum 1.

    ``"hard"`` gives one-hot rows. The smoothing kinds divide the rest, ``1 - sum of the kept probabilities``, equally
    among the other classes. ``"marginal_renorm_kN"`` divides the kept probabilities by their sum and gives 0 to the
    other classes. If the kept probabilities sum to more than 1 by rounding, they are divided by their sum.

    Args:
        stored: result of ``compress`` with this kind; probabilities in half precision are returned as float32.
        kind: see ``compress``.
        num_classes: number of classes ``C``.

    Returns:
        ``[B, C]``, float32 or wider.

    Raises:
        ValueError: if ``kind`` is unknown, ``stored`` is of another kind, or a class is out of range (checked on a CPU
            only).
    """
    check_numbers(least=2, whole=True, num_classes=num_classes)
    kept = kept_classes(kind, num_classes)
    index, probability = stored
    if (
        index.is_floating_point()
        or index.ndim != 2
        or index.shape[1] != kept
        or (probability is None) != (kind == "hard")
    ):
        got = f"{index.dtype} {list(index.shape)}, {'no' if probability is None else 'with'} probabilities"
        raise ValueError(f"stored must be of kind {kind!r}, with integers [B, {kept}], got {got}: give the kind it has")
    index = index.long()
    if index.device.type == "cpu" and index.numel() and not 0 <= int(index.min()) <= int(index.max()) < num_classes:
        raise ValueError(
            f"stored must name classes from 0 to {num_classes - 1}, got {int(index.min())} to {int(index.max())}: give "
            "the num_classes that it was stored with"
        )
    if probability is None:
        return torch.zeros(len(index), num_classes, dtype=torch.float32, device=index.device).scatter_(1, index, 1.0)
    check_shapes(index=(index, "BK"), probability=(probability, "BK"))
    (top,) = at_least_float32(probability)
    total = top.sum(1, keepdim=True)
    if kind.startswith("marginal_renorm"):
        return top.new_zeros(len(top), num_classes).scatter_(1, index, top / total)
    rest = (1 - total).clamp(min=0) / (num_classes - kept)
    return rest.repeat(1, num_classes).scatter_(1, index, top / total.clamp(min=1))
