"""A callback that warns of wrong targets, schedules of another length than the training, and a loss that diverges."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_kd.core.schedules import length_warnings, rise_warnings

__all__ = ["TrainingWatch", "warn_of_schedules"]

# in units of the loss of a uniform guess, which an untrained network reaches: a loss above this is not a slow start
# (inputs of an unusual scale may give it at first, but then it falls)
TRAIN_LIMIT = 1.3
VAL_LIMIT = 10.0
# a network that has diverged and predicts uniformly stays below this
LOST_LIMIT = 1.1
# number of first epochs that are watched, and number of successive rises of the loss that give a warning
EPOCHS = 3


class TrainingWatch(L.Callback):
    """Watches the training for errors and warns; every task adds it itself, and it does not change the training.

    - The problem checks the targets: of every batch on a CPU, of the first batch of a fit on a GPU.
    - At the start it warns of a cosine that does not end with the training, and of a learning rate that rises because a
      resumed training is longer than before.
    - It stores the class names in checkpoints, so that they are not loaded for other classes, and what a prediction
      needs to know of the data.
    - Once in a fit it warns of divergence, which is one of: in the first epochs, a training loss far above that of a
      uniform guess and not lower than in the epoch before, or a validation loss very far above it and higher than ever;
      a training loss that fell from very far above to that of a uniform guess and stays there; a training loss above
      that of a uniform guess that has risen in three successive epochs.
    """

    def __init__(self) -> None:
        self._targets_checked = self._warned = self._validated = False
        self._losses: list[float] = []
        self._val_losses: list[float] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._targets_checked = self._warned = self._validated = False
        self._losses, self._val_losses = [], []
        warn_of_schedules(trainer, pl_module)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        data: Any = getattr(trainer, "datamodule", None)
        names = getattr(data, "class_names", None)
        if names is not None:
            checkpoint["class_names"] = list(names)
        if hasattr(data, "describe"):
            checkpoint["data_description"] = data.describe()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        task: Any = pl_module
        target: Tensor | None = task.training_target(batch)
        if target is not None:
            task.check_target(target, first=not self._targets_checked)
            self._targets_checked = True

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._validated = True

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._check_losses(trainer, pl_module)  # the metrics of the epoch before are logged now

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._check_losses(trainer, pl_module)

    def _check_losses(self, trainer: L.Trainer, task: Any) -> None:
        guessing, values = task.problem.chance_loss, trainer.callback_metrics
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        rate = max((group.get("initial_lr", group["lr"]) for group in groups), default=0.0)
        if not rate or self._warned or guessing is None or "train/loss" not in values:
            return
        self._losses.append(float(values.get("train/loss_ce", values["train/loss"])))
        if self._validated and "val/loss" in values:
            self._val_losses.append(float(values["val/loss"]))
        self._validated = False
        found = self._divergence(guessing, task.loss_is_plain)
        if found is not None:
            self._warned = True
            rank_zero_warn(
                f"{found} after epoch {trainer.current_epoch - 1}, that of guessing is {guessing:.3g}: the training "
                f"diverges; take a lower learning rate (it began at {rate:.3g}), such as {_remedy(trainer, task, rate)}"
            )

    def _divergence(self, guessing: float, plain: bool) -> str | None:
        """The sign of divergence in words, or ``None``.

        Args:
            guessing: the loss of a uniform guess.
            plain: whether the training loss can be compared with it.
        """
        losses, now = self._losses, self._losses[-1]
        if 1 < len(losses) <= EPOCHS + 1:
            if plain and now > TRAIN_LIMIT * guessing and now >= losses[-2]:
                return f"the training loss is {now:.3g}"
            lost = guessing < min(losses[-2:]) and max(losses[-2:]) < LOST_LIMIT * guessing
            if plain and lost and max(losses) > VAL_LIMIT * guessing:
                return f"the training loss was {max(losses):.3g} and stays at {now:.3g}"
            val = self._val_losses
            if len(val) > 1 and val[-1] > VAL_LIMIT * guessing and val[-1] >= max(val):
                return f"the validation loss is {val[-1]:.3g}"
        last = losses[-EPOCHS - 1 :]
        if plain and len(last) > EPOCHS and sorted(set(last)) == last and now > guessing:
            return f"the training loss has risen to {now:.3g} in {EPOCHS} epochs"
        return None


def _remedy(trainer: L.Trainer, task: Any, rate: float) -> str:
    """Options of the command line that may help: a tenth of the learning rate, or AdamW."""
    kind = type(trainer.optimizers[0]).__name__
    same = f"--model.optimizer {kind} " if task.optimizer_factory is None else ""
    other = "" if "Adam" in kind else ", or --model.optimizer AdamW --model.optimizer.lr 3e-4"
    return f"{same}--model.optimizer.lr {rate / 10:.1g}{other}"


def warn_of_schedules(trainer: L.Trainer, task: Any) -> None:
    """Warn of schedules that do not end with the training, or that raise the rate of a resumed one."""
    found: list[str] = []
    if getattr(trainer, "fast_dev_run", 0):
        return
    for config in trainer.lr_scheduler_configs:
        length = task.schedule_length(config.interval)
        if length is not None:
            found += length_warnings(config.scheduler, length, task.scheduled_part, config.interval)
        found += rise_warnings(config.scheduler, config.interval)
    for sentence in dict.fromkeys(found):  # the schedules of two networks give the same warning
        rank_zero_warn(sentence)
