"""Helpers for several processes: their number and rank, sums and means, and gathering the results of samples."""

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
    """The number of processes; 1 without ``torch.distributed``."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_rank() -> int:
    """The rank of this process; 0 without ``torch.distributed``."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def is_first_process() -> bool:
    """Whether this is process 0, which writes files and prints; it works before a Trainer starts the others too."""
    started = dist.is_available() and dist.is_initialized()
    return (process_rank() if started else getattr(rank_zero_only, "rank", 0)) == 0


def gather_by_index(index: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
    """The per-sample values of all processes, sorted by index, each index once. All processes must call it.

    Args:
        index: int64 ``[n]``, samples of this process; ``n`` may differ between processes.
        values: tensors ``[n, ...]`` in the same order.

    Returns:
        ``(index, *values)`` on the CPU.
    """
    return tuple(gather_columns({"index": index, **{str(k): v for k, v in enumerate(values)}}).values())


def gather_columns(columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``gather_by_index`` for columns by name, one of them ``index``; a process without samples may lack the others."""
    parts = [{name: column.detach().cpu() for name, column in columns.items()}]
    if process_count() > 1:
        gathered: list[Any] = [None] * process_count()
        dist.all_gather_object(gathered, parts[0])
        parts = [part for part in gathered if len(part["index"])] or gathered[:1]
    joint = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    order = torch.from_numpy(np.unique(joint["index"].numpy(), return_index=True)[1])
    return {name: column[order] for name, column in joint.items()}


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each gradient by its mean over all processes, which must have gradients of the same parameters."""
    if process_count() > 1:
        gradients = [p.grad for p in parameters if p.grad is not None]
        for gradient, mean in zip(gradients, averaged(gradients), strict=True):
            gradient.copy_(mean)


def averaged(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The mean of each tensor over all processes, which must have tensors of the same shapes."""
    if process_count() == 1:
        return list(tensors)
    joint = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(joint)
    joint /= process_count()
    parts = joint.split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]


def summed(values: Tensor) -> Tensor:
    """``values`` summed over all processes, in place."""
    if process_count() > 1:
        dist.all_reduce(values)
    return values


def share_buffers(module: nn.Module) -> None:
    """Copy the buffers of process 0 to all processes, so that all have the same network."""
    if process_count() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


@contextmanager
def together(device: torch.device) -> Iterator[None]:
    """A context in which an error of one process raises on all, so that no process waits for one that has failed.

    Inside there must be no collective call, which could hang before the end of the context is reached.
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
            raise RuntimeError("another process failed on its share of the samples: see its error message")
    if failed is not None:
        raise failed


def joint_batch(part: Tensor) -> Tensor:
    """The rows ``[n, ...]`` of all processes, in the order of their ranks, differentiable for all of them.

    The gradient of a process's rows is the sum of the gradients that all processes compute for them. All processes must
    call it, and its backward pass.

    Args:
        part: rows of this process; ``n`` may differ between processes.
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
    """The sum of ``part`` over processes; a process without batches gives ``None``.

    Args:
        part: a tensor of the same shape on all processes that have one.
        dtype: dtype of the zeros of a process without batches.
        device: their device.

    Raises:
        ValueError: if no process has a batch.
    """
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
    """The rows (sequences of tensors) of all processes in one list, in the order of their ranks."""
    if process_count() == 1:
        return rows
    everyone: list[list[Sequence[Tensor]]] = [[] for _ in range(process_count())]
    dist.all_gather_object(everyone, rows)
    return [row for part in everyone for row in part]
