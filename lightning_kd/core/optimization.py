"""Optimizer and schedule of a task from its factories, as Lightning wants them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import nn

__all__ = ["make_optimizer", "optimizer_for", "training_length"]


def make_optimizer(
    task: L.LightningModule,
    parameters: Sequence[nn.Parameter],
    optimizer_factory: OptimizerCallable,
    scheduler_factory: LRSchedulerCallable | None,
    interval: str,
) -> Any:
    """What ``configure_optimizers`` returns.

    Args:
        task: whose ``monitor`` a ``ReduceLROnPlateau`` without its own is stepped by.
        parameters: what is trained.
        optimizer_factory: from parameters to an optimizer.
        scheduler_factory: from the optimizer to a scheduler. Default: none.
        interval: ``"epoch"`` or ``"step"``.
    """
    optimizer = optimizer_factory(parameters)
    if scheduler_factory is None:
        return optimizer if task.automatic_optimization else {"optimizer": optimizer}
    schedule: Any = scheduler_factory(optimizer)
    if getattr(schedule, "to_the_end", False) and is_attached(task):
        schedule.set_length(training_length(task.trainer, interval))
    scheduler = {"scheduler": schedule, "interval": interval}
    plateau = isinstance(scheduler["scheduler"], torch.optim.lr_scheduler.ReduceLROnPlateau)
    if plateau and task.automatic_optimization:
        scheduler["monitor"] = getattr(scheduler["scheduler"], "monitor", task.monitor)
        scheduler["frequency"] = task.trainer.check_val_every_n_epoch or 1  # type: ignore[attr-defined]
    return {"optimizer": optimizer, "lr_scheduler": scheduler}


def optimizer_for(
    network: nn.Module, parameters: Sequence[nn.Parameter], has_given_weights: bool = False
) -> torch.optim.Optimizer:
    """What a plain training, and a distillation, take without an ``optimizer``: something that trains.

    Networks with batch normalisation that start from nothing get SGD with learning rate 0.05, momentum 0.9 and weight
    decay 5e-4, the usual choice for them. That rate throws others off their course, so they get AdamW with weight decay
    0.01: learning rate 3e-4 without batch normalisation, and 1e-4 with given weights, which should not be lost in the
    first steps.

    Args:
        network: what is trained.
        parameters: of it, and what else is trained with it.
        has_given_weights: whether it starts from weights of an earlier training.
    """
    if has_given_weights:
        return torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.01)
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules()):
        return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4)
    return torch.optim.AdamW(parameters, lr=3e-4, weight_decay=0.01)


def is_attached(task: L.LightningModule) -> bool:
    """Whether a Trainer works with ``task``, which alone knows how long the training is."""
    try:
        return task.trainer is not None
    except RuntimeError:
        return False


def training_length(trainer: L.Trainer, unit: str) -> int:
    """How many epochs or optimizer steps the whole training has.

    Args:
        trainer: of the fit.
        unit: ``"epoch"`` or ``"step"``.

    Raises:
        ValueError: where that is not known.
    """
    length: float = trainer.estimated_stepping_batches if unit == "step" else trainer.max_epochs or -1
    if not 0 < length < float("inf"):
        raise ValueError(
            f"T_max is missing, and max_epochs={trainer.max_epochs} does not say how long: give one of them"
        )
    return int(length)
