"""A base class for methods with a warm-up and a second stage, for which the optimizer is reset."""

from __future__ import annotations

from lightning_kd.core.task import Task

__all__ = ["TwoStages"]


class TwoStages(Task):
    """A ``Task`` whose second stage begins after ``warmup_epochs``, like a new training from the network so far.

    The state of the optimizer (such as momentum) is cleared, and ``OneCycle`` begins a second cycle.
    """

    warmup_epochs: int

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        if self.current_epoch == self.warmup_epochs > 0:
            self.begin_second_stage()

    def begin_second_stage(self) -> None:
        """Clear the optimizers' state; called before the first epoch of the second stage if there was a warm-up."""
        for optimizer in self.trainer.optimizers:
            optimizer.state.clear()

    def second_stage_begin(self, unit: str) -> int | None:
        if unit == "epoch":
            return self.warmup_epochs
        steps = self.warmup_steps()
        return None if steps is None else self.warmup_epochs * steps

    def warmup_steps(self) -> int | None:
        """Number of optimizer steps in an epoch of the warm-up; ``None`` if unknown in advance."""
        return self.steps_of_epoch()
