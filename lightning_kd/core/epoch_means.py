"""Means over an epoch, accumulated on the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["EpochMeans"]


class EpochMeans:
    """Weighted means by name over the steps of an epoch; nothing is copied from the device before its end."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, ...], list[Any]] = {}

    def clear(self) -> None:
        """Remove all sums, for a new epoch."""
        self._sums.clear()

    def add(self, names: tuple[str, ...], values: Tensor, weight: int | Tensor) -> None:
        """Add the ``values`` ``[len(names)]`` of one step, with its weight, such as its number of samples."""
        entry = self._sums.get(names)
        if entry is None:  # steps may have different sets of names
            wide = torch.float32 if values.device.type == "mps" else torch.float64
            self._sums[names] = entry = [torch.zeros_like(values, dtype=wide), 0]
        if isinstance(weight, int):
            entry[0].add_(values, alpha=weight)
        else:
            entry[0].add_(values * weight)
        entry[1] = entry[1] + weight

    def compute(self, strategy: Any) -> dict[str, float]:
        """The means over all processes by name; ``strategy`` is that of the Trainer."""
        joint: dict[str, list[float]] = {}
        for names, (sums, weight) in self._sums.items():
            total = strategy.reduce(torch.cat([sums, sums.new_tensor([weight])]), reduce_op="sum").tolist()
            for name, value in zip(names, total[:-1], strict=True):  # a name may be in several sets
                entry = joint.setdefault(name, [0.0, 0.0])
                entry[0] += value
                entry[1] += total[-1]
        return {name: value / weight for name, (value, weight) in joint.items() if weight}
