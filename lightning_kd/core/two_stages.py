"""What methods share that train a second stage from the network of a warm-up, with an optimizer that begins anew."""

from __future__ import annotations

from lightning_kd.core.task import Task

__all__ = ["TwoStages"]


class TwoStages(Task):
    """A ``Task`` whose second stage begins after ``warmup_epochs``, as if it were a training of its own.

    The optimizer forgets what it has gathered, and a schedule of cycles begins another one.
    """

    warmup_epochs: int

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        if self.current_epoch == self.warmup_epochs > 0:
            self.begin_second_stage()

    def begin_second_stage(self) -> None:
        """Called before the first epoch of the second stage, where there is a first one."""
        for optimizer in self.trainer.optimizers:
            optimizer.state.clear()

    def second_stage_begin(self, unit: str) -> int | None:
        if unit == "epoch":
            return self.warmup_epochs
        steps = self.warmup_steps()
        return None if steps is None else self.warmup_epochs * steps

    def warmup_steps(self) -> int | None:
        """Optimizer steps of an epoch of the warm-up."""
        return self.steps_of_epoch()
