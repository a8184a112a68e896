"""What sharpness-aware optimizers cannot work with: Trainers and gradients."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy


def check_trainer(trainer: Any, task: L.LightningModule, name: str) -> None:
    """Raise a ``RuntimeError`` for a Trainer under which optimizer ``name`` would not do what it says."""
    if not task.automatic_optimization:
        raise RuntimeError(
            f"{name} needs automatic optimization, got {type(task).__name__} with its own: choose another optimizer"
        )
    if trainer.gradient_clip_val and trainer.gradient_clip_algorithm == "value":
        raise RuntimeError(
            f"clipping by value would turn the way up of {name}, got gradient_clip_algorithm='value': clip by norm"
        )
    if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
        raise RuntimeError(
            f"{name} needs whole gradients on every process, got {type(trainer.strategy).__name__}: use strategy ddp "
            "or one device"
        )


def check_accumulation(trainer: Any, name: str) -> None:
    """Raise a ``RuntimeError`` where a step is made of several batches."""
    if trainer.accumulate_grad_batches > 1:
        raise RuntimeError(
            f"{name} goes up and steps on one batch, got accumulate_grad_batches={trainer.accumulate_grad_batches}: "
            "set it to 1 and enlarge the batch"
        )


def check_gradients(gradients: list[Any], name: str) -> None:
    """Raise a ``TypeError`` for sparse and complex gradients."""
    for gradient in gradients:
        if gradient.layout != torch.strided:
            raise TypeError(f"{name} takes dense gradients, got a sparse one: set sparse=False in the embedding")
        if gradient.is_complex():
            raise TypeError(f"{name} takes real gradients, got {gradient.dtype}: give real and imaginary parts")
