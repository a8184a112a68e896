"""What a training is watched for: wrong targets, a schedule of another length, and a loss that runs away."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_kd.core.schedules import told_of_length, told_of_rise

__all__ = ["TrainingWatch", "warn_of_schedules"]

# A loss this many times that of guessing is no matter of a slow start: a network that knows nothing reaches 1. With
# inputs of another scale it begins there all the same, but comes down.
TRAIN_LIMIT = 1.3
VAL_LIMIT = 10.0
# and this many times is where a network stays that lost all it had
LOST_LIMIT = 1.1
# how many epochs are a beginning, and how many rises of the loss in a row are no accident
EPOCHS = 3


class TrainingWatch(L.Callback):
    """Added by every task. It changes nothing, and speaks only where something is wrong.

    - Targets are looked at by the problem: those of every batch on a CPU, else of the first of a fit.
    - A cosine that does not end with the training is told at its start, and so is a learning rate that goes up because
      a resumed training is longer than it was.
    - Checkpoints hold the names of the classes, so that they are never loaded for others, and what a prediction has to
      know of the data.
    - Once in a fit it warns where the training diverges: where, in one of the first epochs, the loss of a plain
      training is far above that of guessing and no lower than in the epoch before, or the validation loss very far and
      no lower than ever; where the training loss came down from very far above to that of guessing, and stays there; or
      where it has risen from epoch to epoch for three in a row, to more than that of guessing.
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
        self._look(trainer, pl_module)  # the metrics of the epoch before are here now

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._look(trainer, pl_module)

    def _look(self, trainer: L.Trainer, task: Any) -> None:
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
        """What speaks for one; ``guessing`` is the loss of that, ``plain`` whether the training's compares with it."""
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
    """Options of the command line, other than what is in use."""
    kind = type(trainer.optimizers[0]).__name__
    same = f"--model.optimizer {kind} " if task.optimizer_factory is None else ""
    other = "" if "Adam" in kind else ", or --model.optimizer AdamW --model.optimizer.lr 3e-4"
    return f"{same}--model.optimizer.lr {rate / 10:.1g}{other}"


def warn_of_schedules(trainer: L.Trainer, task: Any) -> None:
    """Say where a schedule does not end with the training, or raises the rate of a resumed one."""
    found: list[str] = []
    if getattr(trainer, "fast_dev_run", 0):
        return
    for config in trainer.lr_scheduler_configs:
        length = task.schedule_length(config.interval)
        if length is not None:
            found += told_of_length(config.scheduler, length, task.scheduled_part, config.interval)
        found += told_of_rise(config.scheduler, config.interval)
    for sentence in dict.fromkeys(found):  # once for two networks
        rank_zero_warn(sentence)
