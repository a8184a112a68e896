"""The trained numbers of each sample and class that stand for its wrong label: their start and their steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_kd.core.sample_memory import SampleMemory
from lightning_kd.noisy_labels.bldr_losses import update_rows


def start_rows(memory: SampleMemory, generator: np.random.Generator, strategy: Any) -> None:
    """Fill the rows with numbers near 0.

    Args:
        memory: holds them.
        generator: draws them.
        strategy: of the Trainer.
    """
    rows = memory.rows
    # in float64 on the CPU: the same on every device; from rank 0: the same on all
    start = torch.from_numpy(generator.standard_normal(tuple(rows.shape)) * 1e-8)
    rows.copy_(strategy.broadcast(start))


def check_rows(count: int, num_classes: int, index: Tensor, target: Tensor) -> None:
    """Raise a ``ValueError`` where a batch has an index beyond ``count`` rows, or a target beyond the classes."""
    for name, values, end in (("index", index, count), ("target", target, num_classes)):
        low, high = int(values.min()), int(values.max())
        if low < 0 or high >= end:
            raise ValueError(f"{name} must be between 0 and {end - 1}, got {low} to {high}: check your loader")


def descend_rows(memory: SampleMemory, index: Tensor, rows: Tensor, lr: float, trainer: Any) -> None:
    """A step of gradient descent, after the backward pass of a mean loss of this process's batch.

    Args:
        memory: holds the rows of all samples.
        index: int64 ``[B]``, the samples of the batch.
        rows: ``[B, C]``, what the loss was computed from; without gradient nothing is done.
        lr: learning rate.
        trainer: whose scaler and number of processes are taken out of the gradient.
    """
    if rows.grad is None:
        return
    # the loss is scaled in 16-mixed, and a mean over this process's batch alone
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    scale = torch.tensor(float(trainer.world_size), device=rows.device)
    scale = scale if scaler is None else scaler.scale(scale)
    update_rows(memory.rows, index, rows.grad / scale, lr)
    memory.seen[index] = True
