"""Optimizer and schedule of a task from its factories, as Lightning wants them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import nn

from lightning_kd.core.one_cycle import OneCycle
from lightning_kd.core.schedules import schedule_parts, set_training_length

__all__ = ["epoch_steps", "make_optimizer", "optimizer_for", "steps_of", "tell_length", "training_length"]


def make_optimizer(
    task: Any,
    parameters: Sequence[nn.Parameter],
    optimizer_factory: OptimizerCallable,
    scheduler_factory: LRSchedulerCallable | None,
    interval: str,
) -> Any:
    """What ``configure_optimizers`` returns.

    Args:
        task: a ``Task``; its ``schedule_length`` is told to a schedule that ends with the training, and its ``monitor``
            is what a ``ReduceLROnPlateau`` without its own is stepped by.
        parameters: what is trained.
        optimizer_factory: from parameters to an optimizer.
        scheduler_factory: from the optimizer to a scheduler. Default: none.
        interval: ``"epoch"`` or ``"step"``.
    """
    optimizer = optimizer_factory(parameters)
    if scheduler_factory is None:
        return optimizer if task.automatic_optimization else {"optimizer": optimizer}
    schedule: Any = scheduler_factory(optimizer)
    tell_length(schedule, task, interval)
    scheduler = {"scheduler": schedule, "interval": interval}
    plateau = isinstance(scheduler["scheduler"], torch.optim.lr_scheduler.ReduceLROnPlateau)
    if plateau and task.automatic_optimization:
        scheduler["monitor"] = getattr(scheduler["scheduler"], "monitor", task.monitor)
        scheduler["frequency"] = task.trainer.check_val_every_n_epoch or 1
    return {"optimizer": optimizer, "lr_scheduler": scheduler}


def optimizer_for(
    network: nn.Module,
    parameters: Sequence[nn.Parameter],
    has_given_weights: bool = False,
    summed_loss: bool = False,
) -> torch.optim.Optimizer:
    """What a plain training, and a distillation, take without an ``optimizer``: something that trains.

    Networks with batch normalisation that start from nothing get SGD with learning rate 0.05, momentum 0.9 and weight
    decay 5e-4, the usual choice for them. That rate throws others off their course, so they get AdamW with weight decay
    0.01: learning rate 3e-4 without batch normalisation, and 1e-4 with given weights, which should not be lost in the
    first steps. A loss that is a sum over the batch is far too large for that rate too.

    Args:
        network: what is trained.
        parameters: of it, and what else is trained with it.
        has_given_weights: whether it starts from weights of an earlier training.
        summed_loss: whether the loss is a sum over all images and labels of a batch, not a mean.
    """
    if has_given_weights:
        return torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.01)
    if not summed_loss and any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules()):
        return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4)
    return torch.optim.AdamW(parameters, lr=3e-4, weight_decay=0.01)


def is_attached(task: L.LightningModule) -> bool:
    """Whether a Trainer works with ``task``, which alone knows how long the training is."""
    try:
        return task.trainer is not None
    except RuntimeError:
        return False


def tell_length(schedule: Any, task: Any, unit: str) -> None:
    """Tell a schedule that ends with the training how long that is, and one of cycles when a second stage begins.

    Nothing where no Trainer works with ``task``.

    Raises:
        ValueError: where that is not known in advance.
    """
    if not is_attached(task):
        return
    for part, begin, _ in schedule_parts(schedule):
        if isinstance(part, OneCycle):
            second = task.second_stage_begin(unit)
            part.set_second_stage(None if second is None else max(second - begin, 0))
    tied = [part for part, _, _ in schedule_parts(schedule) if getattr(part, "to_the_end", False)]
    if not tied:
        return
    length = task.schedule_length(unit)
    if length is None:
        epochs, steps = task.trainer.max_epochs, task.trainer.max_steps
        remedy = "max_epochs" if steps == -1 else "max_epochs without max_steps"
        remedy = f"lr_interval epoch with {remedy}" if unit == "step" else remedy
        raise ValueError(
            f"{type(tied[0]).__name__} ends with the training, and max_epochs={epochs} with max_steps={steps} does not "
            f"say how many {unit}s {type(task).__name__} trains: give {remedy}, or a schedule of a length of its own"
        )
    set_training_length(schedule, length)


def epoch_steps(trainer: L.Trainer) -> int | None:
    """Optimizer steps of an epoch of automatic optimization; ``None`` for data without a length."""
    if trainer.train_dataloader is None:
        trainer.fit_loop.setup_data()
    batches = trainer.num_training_batches
    return None if math.isinf(batches) else math.ceil(batches / trainer.accumulate_grad_batches)


def steps_of(trainer: L.Trainer, batches: int) -> int:
    """Optimizer steps of an epoch whose loader has so many batches, as ``limit_train_batches`` lets it."""
    limit = trainer.limit_train_batches
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    return math.ceil(batches / trainer.accumulate_grad_batches)


def training_length(trainer: L.Trainer, unit: str, steps_of_epoch: Callable[[], int | None]) -> int | None:
    """How many epochs or optimizer steps the whole training has, by ``max_epochs`` and ``max_steps``.

    Args:
        trainer: of the fit.
        unit: ``"epoch"`` or ``"step"``.
        steps_of_epoch: gives the steps of an epoch, ``None`` where they are not known; asked only where needed.

    Returns:
        At least 1; ``None`` where it is not known in advance.
    """
    epochs = -1 if trainer.max_epochs is None else trainer.max_epochs
    limited = trainer.max_steps != -1
    if unit == "epoch" and (not limited or epochs in (0, 1)):
        return None if epochs == -1 else max(epochs, 1)
    if unit == "step" and epochs == -1:
        return max(trainer.max_steps, 1) if limited else None
    count = steps_of_epoch()
    if count is None:
        return None
    count = max(count, 1)
    if unit == "epoch":
        least = max(math.ceil(trainer.max_steps / count), 1)
        return least if epochs == -1 else min(epochs, least)
    steps = count * max(epochs, 1)
    return min(steps, max(trainer.max_steps, 1)) if limited else steps
