"""Targets of mixed images: a label matrix, whose rows hold the shares of the classes in each sample."""

from __future__ import annotations

from torch import Tensor

from lightning_kd.core.losses import check_shapes, check_target

__all__ = ["check_target_or_matrix", "main_class"]


def check_target_or_matrix(logits: Tensor, target: Tensor) -> None:
    """Raise ``ValueError`` unless ``target`` is int64 ``[B]``, or a label matrix ``[B, C]`` like the logits.

    A label matrix is floating point, with entries of at least 0 and rows that sum to 1. Values are checked on a CPU
    alone, as the check would make a GPU wait.
    """
    if target.ndim != 2 or not target.is_floating_point():
        check_target(logits, target)
        return
    check_shapes(logits=(logits, "BC"), target=(target, "BC"))
    if target.device.type == "cpu" and target.numel():
        low, total = target.min().item(), target.float().sum(1)
        if not low >= 0 or not (total - 1).abs().max() < 0.01:
            raise ValueError(
                f"target must be a label matrix with values of at least 0 and rows that sum to 1, got values from "
                f"{low:g} and sums from {total.min().item():g} to {total.max().item():g}: give the share of each class"
            )


def main_class(target: Tensor) -> Tensor:
    """The class of each sample, int64 ``[B]``: ``target`` itself, or the largest share in a label matrix ``[B, C]``."""
    return target if target.ndim == 1 or not target.is_floating_point() else target.argmax(1)
