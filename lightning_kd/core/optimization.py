"""Optimizer and schedule of a task from its factories, as Lightning wants them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import nn

__all__ = ["make_optimizer"]


def make_optimizer(
    task: L.LightningModule,
    parameters: Sequence[nn.Parameter],
    optimizer_factory: OptimizerCallable | None,
    scheduler_factory: LRSchedulerCallable | None,
    interval: str,
) -> Any:
    """What ``configure_optimizers`` returns.

    Args:
        task: whose ``monitor`` a ``ReduceLROnPlateau`` without its own is stepped by.
        parameters: what is trained.
        optimizer_factory: from parameters to an optimizer. Default: SGD with 0.05, momentum 0.9, weight decay 5e-4.
        scheduler_factory: from the optimizer to a scheduler. Default: none.
        interval: ``"epoch"`` or ``"step"``.
    """
    if optimizer_factory is None:
        optimizer: torch.optim.Optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4)
    else:
        optimizer = optimizer_factory(parameters)
    if scheduler_factory is None:
        return optimizer if task.automatic_optimization else {"optimizer": optimizer}
    scheduler = {"scheduler": scheduler_factory(optimizer), "interval": interval}
    plateau = isinstance(scheduler["scheduler"], torch.optim.lr_scheduler.ReduceLROnPlateau)
    if plateau and task.automatic_optimization:
        scheduler["monitor"] = getattr(scheduler["scheduler"], "monitor", task.monitor)
        scheduler["frequency"] = task.trainer.check_val_every_n_epoch or 1  # type: ignore[attr-defined]
    return {"optimizer": optimizer, "lr_scheduler": scheduler}
