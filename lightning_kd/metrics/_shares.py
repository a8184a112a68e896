"""What several processes, each with a share of the samples, have to agree on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@contextmanager
def together(device: torch.device) -> Iterator[None]:
    """An error of one process inside is an error of all, so that none waits for another that went elsewhere.

    Inside there must be nothing that processes do together, which could hang before this gets to speak.
    """
    failed: Exception | None = None
    try:
        yield
    except Exception as error:
        failed = error
    if distributed():
        failures = torch.tensor(float(failed is not None), device=device)
        dist.all_reduce(failures)
        if failed is None and failures:
            raise RuntimeError("another process could not do its share of the samples: see its message")
    if failed is not None:
        raise failed


def summed(part: Tensor | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The sum over processes; ``None`` where a process has no batch and knows no shape."""
    if distributed():
        shapes: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(shapes, None if part is None else tuple(part.shape))
        shape = next((s for s in shapes if s is not None), None)
        if shape is not None:
            part = torch.zeros(shape, dtype=dtype, device=device) if part is None else part
            dist.all_reduce(part)
    if part is None:
        raise ValueError("loader gave no batch: give at least one sample")
    return part


def gathered(rows: list[Sequence[Tensor]]) -> list[Sequence[Tensor]]:
    """The rows of all processes."""
    if not distributed():
        return rows
    everyone: list[list[Sequence[Tensor]]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, rows)
    return [row for part in everyone for row in part]
