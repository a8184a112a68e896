"""Checks of the Trainer and the gradients for sharpness-aware optimizers."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy


def check_trainer(trainer: Any, task: L.LightningModule, name: str) -> None:
    """Raise a ``RuntimeError`` for settings of the Trainer under which the optimizer ``name`` would be wrong."""
    if not task.automatic_optimization:
        raise RuntimeError(
            f"{name} needs automatic optimization, got {type(task).__name__} with manual optimization: choose another "
            "optimizer"
        )
    if trainer.gradient_clip_val and trainer.gradient_clip_algorithm == "value":
        raise RuntimeError(
            f"{name} cannot clip by value, which would change the direction of its first step, got "
            "gradient_clip_algorithm='value': clip by norm"
        )
    if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
        raise RuntimeError(
            f"{name} needs whole gradients on every process, got {type(trainer.strategy).__name__}: use strategy ddp "
            "or one device"
        )


def check_accumulation(trainer: Any, name: str) -> None:
    """Raise a ``RuntimeError`` if gradients are accumulated over several batches."""
    if trainer.accumulate_grad_batches > 1:
        raise RuntimeError(
            f"{name} needs both gradients from one batch, got accumulate_grad_batches="
            f"{trainer.accumulate_grad_batches}: set it to 1 and enlarge the batch"
        )


def check_gradients(gradients: list[Any], name: str) -> None:
    """Raise a ``TypeError`` for sparse and complex gradients."""
    for gradient in gradients:
        if gradient.layout != torch.strided:
            raise TypeError(f"{name} takes dense gradients, got a sparse one: set sparse=False in the embedding")
        if gradient.is_complex():
            raise TypeError(f"{name} takes real gradients, got {gradient.dtype}: give real and imaginary parts")
