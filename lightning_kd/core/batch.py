"""The batch format of the package, and reading batches of other forms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """The batch that every data module yields and every task takes.

    Attributes:
        image: float ``[B, C, H, W]`` (or ``[B, D]`` features); a tuple of these if several views are given.
        target: int64 ``[B]``; float32 ``[B, C]`` for several labels, int64 ``[B, H, W]`` for masks. -1 means no label:
            a label that is not known, an ignored pixel, an unlabelled sample of a pool (supervised training refuses the
            latter).
        index: int64 ``[B]``, the position of each sample in the split's full array, whatever the shuffling, subset,
            worker and process, so that a method can store things for each sample. ``None`` only from a user's loader.
        extras: further tensors of the batch by name (keys of views, clean targets, stored teacher logits), first
            dimension ``B``.
    """

    image: Any
    target: Tensor
    index: Tensor | None = None  # type: ignore[assignment]  # hides the method tuple.index
    extras: dict[str, Tensor] = {}


def as_batch(batch: Any) -> Batch:
    """A ``Batch`` from itself, or from a user's ``(image, target)``, ``(..., index)`` or ``(..., index, extras)``.

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


def batch_size(batch: Any) -> int:
    """The number of samples in a batch of any form: the length of its targets ``batch[1]``, or of its first tensor.

    Raises:
        TypeError: if it holds no tensor.
    """
    if isinstance(batch, Sequence) and len(batch) > 1 and isinstance(batch[1], Tensor):
        return len(batch[1])
    first = _first_tensor(batch)
    if first is None:
        raise TypeError(f"a batch must hold a tensor, got {type(batch).__name__}: let the loader give (image, target)")
    return len(first)


def is_batch(data: Any, targets: bool = True) -> bool:
    """Whether ``data`` is one batch, not several.

    Args:
        data: a batch or an iterable of batches.
        targets: whether batches have targets; without, two tensors of images are two batches.
    """
    if isinstance(data, Mapping | Tensor) or hasattr(data, "_fields"):
        return True
    if not (isinstance(data, list | tuple) and data and isinstance(data[0], Tensor)):
        return False
    if targets:
        return True
    return len(data) == 2 and isinstance(data[1], Tensor) and (data[1].ndim == 1 or not data[1].is_floating_point())


def _first_tensor(batch: Any) -> Tensor | None:
    if isinstance(batch, Tensor):
        return batch
    if not isinstance(batch, Mapping | Sequence) or isinstance(batch, str | bytes):
        return None
    parts = batch.values() if isinstance(batch, Mapping) else batch
    return next((found for part in parts if (found := _first_tensor(part)) is not None), None)
