"""A callback that logs the test accuracy of every epoch."""

from __future__ import annotations

from typing import Any

import lightning as L

from lightning_kd.argument_checks import check_numbers
from lightning_kd.callbacks._curve_metrics import evaluate


class TestCurve(L.Callback):
    """Evaluate the test set after each training epoch, for reports of "the last" and "the mean of the last ten" epochs.

    Papers on noisy labels report such numbers. Do not select a checkpoint, an epoch or a setting by them.

    Logged: ``curve/acc``, ``curve/ece`` (15 bins) and ``curve/acc_last``, the mean accuracy of the last epochs so far;
    for another kind of problem its metrics, such as ``curve/map`` and ``curve/map_last``. The last accuracies are in
    checkpoints, so that a resumed run logs the same values as an uninterrupted one. With
    ``Trainer(limit_test_batches=0)`` it does nothing.

    Several processes: each evaluates its share of the test set, and the sums are added.

    Args:
        last: number of epochs that ``curve/acc_last`` is the mean over, 1 or more.

    Raises:
        ValueError: for ``last`` below 1, and in a fit without a data module.
    """

    def __init__(self, last: int = 10) -> None:
        check_numbers(least=1, whole=True, last=last)
        self.last = last
        self._accuracies: list[float] = []
        self._loader: Any = None

    def state_dict(self) -> dict[str, Any]:
        return {"accuracies": list(self._accuracies)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._accuracies = list(state_dict["accuracies"])[-self.last :]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.current_epoch == 0:  # a resumed fit loads those of its checkpoint
            self._accuracies = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.limit_test_batches == 0:  # type: ignore[attr-defined]
            return
        data = getattr(trainer, "datamodule", None)
        if data is None:
            raise ValueError(
                "TestCurve takes the test set from a data module, got a fit without one: give datamodule=..."
            )
        data.setup("test")  # Lightning called setup("fit") only
        self._loader = data.test_dataloader()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._loader = None

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        limit = trainer.limit_test_batches  # type: ignore[attr-defined]
        if limit == 0:
            return
        name = pl_module.problem.monitored  # type: ignore[union-attr]
        found = {
            key: float(value) for key, value in evaluate(trainer, pl_module, self._loader, limit).compute().items()
        }
        self._accuracies = [*self._accuracies, found[name]][-self.last :]  # type: ignore[index]
        mean = sum(self._accuracies) / len(self._accuracies)
        pl_module.log_dict({**{f"curve/{key}": value for key, value in found.items()}, f"curve/{name}_last": mean})
