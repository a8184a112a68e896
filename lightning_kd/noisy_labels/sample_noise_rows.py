"""BLDR's trained values of each sample and class that absorb wrong labels: initialisation and update."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_kd.core.sample_memory import SampleMemory
from lightning_kd.noisy_labels.bldr_losses import update_rows


def start_rows(memory: SampleMemory, generator: np.random.Generator, strategy: Any) -> None:
    """Initialise the rows with random numbers near 0.

    Args:
        memory: memory of the rows.
        generator: source of the random numbers.
        strategy: strategy of the Trainer.
    """
    rows = memory.rows
    # drawn in float64 on the CPU, for the same values on every device, and sent from rank 0 to all processes
    start = torch.from_numpy(generator.standard_normal(tuple(rows.shape)) * 1e-8)
    rows.copy_(strategy.broadcast(start))


def check_rows(count: int, num_classes: int, index: Tensor, target: Tensor) -> None:
    """Raise ``ValueError`` if an index of a batch is not below ``count``, or a target is not below ``num_classes``."""
    for name, values, end in (("index", index, count), ("target", target, num_classes)):
        low, high = int(values.min()), int(values.max())
        if low < 0 or high >= end:
            raise ValueError(f"{name} must be between 0 and {end - 1}, got {low} to {high}: check your loader")


def descend_rows(memory: SampleMemory, index: Tensor, rows: Tensor, lr: float, trainer: Any) -> None:
    """One step of gradient descent on the rows, after the backward pass of a loss that is a mean over the batch.

    Args:
        memory: memory with the rows of all samples.
        index: int64 ``[B]``, the samples of the batch.
        rows: ``[B, C]``, the tensor in the loss; without gradient nothing is done.
        lr: learning rate.
        trainer: the Trainer; the gradient is divided by its loss scale and number of processes.
    """
    if rows.grad is None:
        return
    # undo the loss scale of 16-mixed, and turn the mean over this process's batch into one over the joint batch
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    scale = torch.tensor(float(trainer.world_size), device=rows.device)
    scale = scale if scaler is None else scaler.scale(scale)
    update_rows(memory.rows, index, rows.grad / scale, lr)
    memory.seen[index] = True
