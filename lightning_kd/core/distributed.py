"""Gathering per-sample results over processes."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn


def process_count() -> int:
    """How many processes work together; 1 without ``torch.distributed``."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_rank() -> int:
    """The number of this process, 0 for the first or the only one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def is_first_process() -> bool:
    """Whether this process writes files and prints for all."""
    return process_rank() == 0


def gather_by_index(index: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
    """All processes' per-sample values, sorted by index, each index once, on every process.

    Args:
        index: int64 ``[n]`` of this process; ``n`` may differ between processes.
        values: tensors ``[n, ...]`` in the same order.

    Returns:
        ``(index, *values)`` on the CPU.
    """
    parts = [index.detach().cpu(), *(v.detach().cpu() for v in values)]
    if process_count() > 1:
        gathered: list[list[Tensor]] = [[] for _ in range(process_count())]
        dist.all_gather_object(gathered, parts)
        parts = [torch.cat(columns) for columns in zip(*gathered, strict=True)]
    order = torch.from_numpy(np.unique(parts[0].numpy(), return_index=True)[1])
    return tuple(part[order] for part in parts)


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """The mean of each gradient over all processes; a parameter without gradient, on all of them, stays so."""
    if process_count() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    joint = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(joint)
    joint /= process_count()
    for gradient, part in zip(gradients, joint.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
