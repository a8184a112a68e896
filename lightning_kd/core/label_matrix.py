"""Targets of mixed images: a label matrix, whose rows share one sample between classes."""

from __future__ import annotations

from torch import Tensor

from lightning_kd.core.losses import check_shapes, check_target

__all__ = ["check_target_or_matrix", "main_class"]


def check_target_or_matrix(logits: Tensor, target: Tensor) -> None:
    """Raise ``ValueError`` unless ``target`` is int64 ``[B]`` of the ``C`` classes, or a label matrix as the logits.

    A label matrix is floating point ``[B, C]``, with rows of at least 0 that sum to 1. Its values, like the range of
    classes, are looked at on a CPU only: a GPU would have to wait.
    """
    if target.ndim != 2 or not target.is_floating_point():
        check_target(logits, target)
        return
    check_shapes(logits=(logits, "BC"), target=(target, "BC"))
    if target.device.type == "cpu" and target.numel():
        low, total = target.min().item(), target.float().sum(1)
        if not low >= 0 or not (total - 1).abs().max() < 0.01:
            raise ValueError(
                f"target must be a label matrix with rows of at least 0 that sum to 1, got values from {low:g} and "
                f"sums from {total.min().item():g} to {total.max().item():g}: give the share of each class"
            )


def main_class(target: Tensor) -> Tensor:
    """Classes int64 ``[B]`` as they are, or those with the largest share in a label matrix ``[B, C]``."""
    return target if target.ndim == 1 or not target.is_floating_point() else target.argmax(1)
