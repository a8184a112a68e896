"""What several processes agree on: who they are, sums, and results of samples gathered from all of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce


def process_count() -> int:
    """How many processes work together; 1 without ``torch.distributed``."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_rank() -> int:
    """The number of this process, 0 for the first or the only one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def is_first_process() -> bool:
    """Whether this process writes files and prints for all; before a Trainer has started the others, too."""
    started = dist.is_available() and dist.is_initialized()
    return (process_rank() if started else getattr(rank_zero_only, "rank", 0)) == 0


def gather_by_index(index: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
    """All processes' per-sample values, sorted by index, each index once, on every process.

    Args:
        index: int64 ``[n]`` of this process; ``n`` may differ between processes.
        values: tensors ``[n, ...]`` in the same order.

    Returns:
        ``(index, *values)`` on the CPU.
    """
    return tuple(gather_columns({"index": index, **{str(k): v for k, v in enumerate(values)}}).values())


def gather_columns(columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same of columns by name, one of them ``index``, whose other names a process without samples may lack."""
    parts = [{name: column.detach().cpu() for name, column in columns.items()}]
    if process_count() > 1:
        gathered: list[Any] = [None] * process_count()
        dist.all_gather_object(gathered, parts[0])
        parts = [part for part in gathered if len(part["index"])] or gathered[:1]
    joint = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    order = torch.from_numpy(np.unique(joint["index"].numpy(), return_index=True)[1])
    return {name: column[order] for name, column in joint.items()}


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """The mean of each gradient over all processes; a parameter without gradient, on all of them, stays so."""
    if process_count() > 1:
        gradients = [p.grad for p in parameters if p.grad is not None]
        for gradient, mean in zip(gradients, averaged(gradients), strict=True):
            gradient.copy_(mean)


def averaged(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The mean of each over all processes, which have tensors of the same shapes; alone, they themselves."""
    if process_count() == 1:
        return list(tensors)
    joint = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(joint)
    joint /= process_count()
    parts = joint.split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]


def summed(values: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    if process_count() > 1:
        dist.all_reduce(values)
    return values


def share_buffers(module: nn.Module) -> None:
    """Give all processes the buffers of the first, so that all see one network."""
    if process_count() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


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
    if process_count() > 1:
        failures = torch.tensor(float(failed is not None), device=device)
        dist.all_reduce(failures)
        if failed is None and failures:
            raise RuntimeError("another process could not do its share of the samples: see its message")
    if failed is not None:
        raise failed


def joint_batch(part: Tensor) -> Tensor:
    """The rows ``[n, ...]`` of all processes, in the order of the processes, with a graph that leads to all of them.

    The gradient of a process's rows is the sum of what the processes make of them. Collective, in the backward pass
    too.

    Args:
        part: of this process; ``n`` may differ between processes.
    """
    if process_count() == 1:
        return part
    sizes = torch.zeros(process_count(), dtype=torch.int64, device=part.device)
    sizes[process_rank()] = len(part)
    dist.all_reduce(sizes)
    before, after = int(sizes[: process_rank()].sum()), int(sizes[process_rank() + 1 :].sum())
    padded = [part.new_zeros(count, *part.shape[1:]) for count in (before, after)]
    return all_reduce(torch.cat([padded[0], part, padded[1]]))


def sum_of_parts(part: Tensor | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The sum over processes; ``None`` where a process has no batch and knows no shape."""
    if process_count() > 1:
        shapes: list[Any] = [None] * process_count()
        dist.all_gather_object(shapes, None if part is None else tuple(part.shape))
        shape = next((s for s in shapes if s is not None), None)
        if shape is not None:
            part = torch.zeros(shape, dtype=dtype, device=device) if part is None else part
            dist.all_reduce(part)
    if part is None:
        raise ValueError("loader gave no batch: give at least one sample")
    return part


def gather_rows(rows: list[Sequence[Tensor]]) -> list[Sequence[Tensor]]:
    """The rows of all processes."""
    if process_count() == 1:
        return rows
    everyone: list[list[Sequence[Tensor]]] = [[] for _ in range(process_count())]
    dist.all_gather_object(everyone, rows)
    return [row for part in everyone for row in part]
