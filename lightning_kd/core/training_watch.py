"""What a training is watched for: wrong targets, a schedule of another length, and a loss that runs away."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_kd.core.schedules import told_of_length, told_of_rise

__all__ = ["TrainingWatch", "warn_of_schedules"]

# A loss this many times that of guessing is no matter of a slow start: a network that knows nothing reaches 1.
TRAIN_LIMIT = 1.3
VAL_LIMIT = 10.0
# how many epochs are a beginning, and how many rises of the loss in a row are no accident
EPOCHS = 3


class TrainingWatch(L.Callback):
    """Added by every task. It changes nothing, and speaks only where something is wrong.

    - Targets are looked at by the problem: those of every batch on a CPU, else of the first of a fit.
    - A cosine that does not end with the training is told at its start, and so is a learning rate that goes up because
      a resumed training is longer than it was.
    - Checkpoints hold the names of the classes, so that they are never loaded for others.
    - Once in a fit it warns where the training diverges: where, after one of the first epochs, the loss of a plain
      training is far above that of guessing or the validation loss very far, or where the training loss has risen from
      epoch to epoch for three in a row, to more than that of guessing.
    """

    def __init__(self) -> None:
        self._targets_checked = self._warned = False
        self._losses: list[float] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._targets_checked = self._warned = False
        self._losses = []
        warn_of_schedules(trainer, pl_module)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        names = getattr(getattr(trainer, "datamodule", None), "class_names", None)
        if names is not None:
            checkpoint["class_names"] = list(names)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        task: Any = pl_module
        target: Tensor | None = task.training_target(batch)
        if target is not None:
            task.check_target(target, first=not self._targets_checked)
            self._targets_checked = True

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._look(trainer, pl_module)  # the metrics of the epoch before are here now

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._look(trainer, pl_module)

    def _look(self, trainer: L.Trainer, task: Any) -> None:
        guessing, values = task.problem.chance_loss, trainer.callback_metrics
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        rate = max((group.get("initial_lr", group["lr"]) for group in groups), default=0.0)
        if not rate or self._warned or guessing is None or "train/loss" not in values:
            return
        train = float(values.get("train/loss_ce", values["train/loss"]))
        val = float(values.get("val/loss", 0.0))
        self._losses = [*self._losses, train][-EPOCHS - 1 :]
        plain = task.loss_is_plain
        found = None
        if len(self._losses) <= EPOCHS and plain and train > TRAIN_LIMIT * guessing:
            found = f"the training loss is {train:.3g}"
        elif len(self._losses) <= EPOCHS and val > VAL_LIMIT * guessing:
            found = f"the validation loss is {val:.3g}"
        elif plain and len(self._losses) > EPOCHS and sorted(set(self._losses)) == self._losses and train > guessing:
            found = f"the training loss has risen to {train:.3g} in {EPOCHS} epochs"
        if found is not None:
            self._warned = True
            rank_zero_warn(
                f"{found} after epoch {trainer.current_epoch - 1}, that of guessing is {guessing:.3g}: the training "
                f"diverges; take a lower learning rate (it began at {rate:.3g}), such as --model.optimizer SGD "
                f"--model.optimizer.lr {rate / 10:.1g}, or --model.optimizer AdamW --model.optimizer.lr 3e-4"
            )


def warn_of_schedules(trainer: L.Trainer, task: Any) -> None:
    """Say where a schedule does not end with the training, or raises the rate of a resumed one."""
    found: list[str] = []
    if getattr(trainer, "fast_dev_run", 0):
        return
    for config in trainer.lr_scheduler_configs:
        length = task.schedule_length("epoch") if config.interval == "epoch" else None
        if length is not None:
            found += told_of_length(config.scheduler, length, task.scheduled_part)
        found += told_of_rise(config.scheduler, config.interval)
    for sentence in dict.fromkeys(found):  # once for two networks
        rank_zero_warn(sentence)
