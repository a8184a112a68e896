"""Gathering per-sample results over processes."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn


def gather_by_index(index: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
    """All processes' per-sample values, sorted by index, each index once, on every process.

    Args:
        index: int64 ``[n]`` of this process; ``n`` may differ between processes.
        values: tensors ``[n, ...]`` in the same order.

    Returns:
        ``(index, *values)`` on the CPU.
    """
    parts = [index.detach().cpu(), *(v.detach().cpu() for v in values)]
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        gathered: list[list[Tensor]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(gathered, parts)
        parts = [torch.cat(columns) for columns in zip(*gathered, strict=True)]
    order = torch.from_numpy(np.unique(parts[0].numpy(), return_index=True)[1])
    return tuple(part[order] for part in parts)


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """The mean of each gradient over all processes; a parameter without gradient, on all of them, stays so."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    joint = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(joint)
    joint /= dist.get_world_size()
    for gradient, part in zip(gradients, joint.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
