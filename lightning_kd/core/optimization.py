"""Making the optimizer and the schedule of a task from its factories."""

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
    """The return value of ``configure_optimizers``.

    Args:
        task: a ``Task``. A schedule that ends with the training gets its ``schedule_length``; a ``ReduceLROnPlateau``
            without a metric of its own monitors its ``monitor``.
        parameters: the trained parameters.
        optimizer_factory: from parameters to an optimizer.
        scheduler_factory: from the optimizer to a scheduler; ``None`` for a constant learning rate.
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
    """The default optimizer of supervised training and distillation, chosen so that most networks train with it.

    Networks with batch normalisation and random weights get SGD with learning rate 0.05, momentum 0.9 and weight decay
    5e-4, the usual choice for them. Others diverge at that rate and get AdamW with weight decay 0.01: with learning
    rate 1e-4 if they start from given weights, which larger first steps would destroy, else with 3e-4. A loss that is a
    sum over the batch is also too large for SGD at 0.05 and gets AdamW.

    Args:
        network: the trained network.
        parameters: its parameters, and others that are trained with it.
        has_given_weights: whether it starts from weights of an earlier training.
        summed_loss: whether the loss is a sum over all images and labels of a batch, not a mean.
    """
    if has_given_weights:
        return torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.01)
    if not summed_loss and any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules()):
        return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4)
    return torch.optim.AdamW(parameters, lr=3e-4, weight_decay=0.01)


def fit_to_float16(optimizer: torch.optim.Optimizer, by_default: bool) -> None:
    """Check that ``eps`` of an optimizer such as Adam, by which it avoids a division by 0, is above 0 in float16 too.

    Args:
        optimizer: a new optimizer; its parameters have the dtype of the training.
        by_default: True for the default optimizer of a task, whose ``eps`` is then set to 1e-4; False for one that the
            user chose.

    Raises:
        ValueError: if ``eps`` of an optimizer that the user chose is 0 in float16.
    """
    for group in optimizer.param_groups:
        eps = group.get("eps")
        if not isinstance(eps, float) or eps == 0 or torch.tensor(eps, dtype=torch.float16) > 0:
            continue
        if any(parameter.dtype == torch.float16 for parameter in group["params"]):
            if not by_default:
                raise ValueError(
                    f"eps={eps:g} of {type(optimizer).__name__} is 0 in float16, and the optimizer would divide by it: "
                    "set eps=1e-4, or trainer.precision to bf16-true or 16-mixed"
                )
            group["eps"] = optimizer.defaults["eps"] = 1e-4


def is_attached(task: L.LightningModule) -> bool:
    """Whether ``task`` has a Trainer, without which the length of the training is unknown."""
    try:
        return task.trainer is not None
    except RuntimeError:
        return False


def tell_length(schedule: Any, task: Any, unit: str) -> None:
    """Set the length of a schedule that ends with the training, and the start of a second cycle of ``OneCycle``.

    Without a Trainer nothing happens.

    Args:
        schedule: any scheduler, or a combination of several.
        task: the ``Task``.
        unit: ``"epoch"`` or ``"step"``.

    Raises:
        ValueError: if the length of the training is not known in advance.
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
            f"say how many {unit}s {type(task).__name__} trains: give {remedy}, or give the schedule its length"
        )
    set_training_length(schedule, length)


def epoch_steps(trainer: L.Trainer) -> int | None:
    """Number of optimizer steps in an epoch of automatic optimization; ``None`` for data without a length."""
    if trainer.train_dataloader is None:
        trainer.fit_loop.setup_data()
    batches = trainer.num_training_batches
    return None if math.isinf(batches) else math.ceil(batches / trainer.accumulate_grad_batches)


def steps_of(trainer: L.Trainer, batches: int) -> int:
    """Number of optimizer steps in an epoch of ``batches`` batches, given the Trainer's ``limit_train_batches``."""
    limit = trainer.limit_train_batches
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    return math.ceil(batches / trainer.accumulate_grad_batches)


def training_length(trainer: L.Trainer, unit: str, steps_of_epoch: Callable[[], int | None]) -> int | None:
    """The number of epochs or optimizer steps of the whole training, from ``max_epochs`` and ``max_steps``.

    Args:
        trainer: the Trainer of the fit.
        unit: ``"epoch"`` or ``"step"``.
        steps_of_epoch: returns the steps of an epoch, or ``None`` if they are unknown; called only if needed.

    Returns:
        At least 1; ``None`` if it is not known in advance.
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
