"""The one batch format of the project."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """What every data module yields and every task takes.

    Attributes:
        image: float ``[B, C, H, W]`` (or ``[B, D]`` features); a tuple of them where several views are asked for.
        target: int64 ``[B]``.
        index: int64 ``[B]``, the position of each sample in the split's full array. It survives shuffling, subsets,
            workers and processes, so that per-sample memories can be kept. ``None`` only for a user's own loader.
        extras: further tensors of the batch by name (views' ids, clean targets, cached teacher logits), first
            dimension ``B``.
    """

    image: Any
    target: Tensor
    index: Tensor | None = None  # type: ignore[assignment]  # tuple.index gives way
    extras: dict[str, Tensor] = {}


def as_batch(batch: Any) -> Batch:
    """Take a ``Batch``, or ``(image, target)`` from a user's own loader, perhaps with ``index`` and ``extras``.

    Raises:
        TypeError: for anything else, naming what was received.
    """
    if isinstance(batch, Batch):
        return batch
    if isinstance(batch, Sequence) and not isinstance(batch, str) and 2 <= len(batch) <= 4:
        index = batch[2] if len(batch) > 2 else None
        return Batch(batch[0], batch[1], index, batch[3] if len(batch) > 3 else {})
    got = f"{type(batch).__name__}" + (f" of length {len(batch)}" if hasattr(batch, "__len__") else "")
    raise TypeError(f"a batch must be a Batch or a pair (image, target), got {got}: let the loader yield pairs")
