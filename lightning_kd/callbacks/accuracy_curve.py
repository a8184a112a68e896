"""The test accuracy of every epoch."""

from __future__ import annotations

from typing import Any

import lightning as L

from lightning_kd.argument_checks import check_numbers
from lightning_kd.callbacks._curve_metrics import evaluate


class TestCurve(L.Callback):
    """Evaluate the test set after each training epoch, for reports of "the last" and "the mean of the last ten" epochs.

    Logs ``curve/acc``, ``curve/ece`` (15 bins) and ``curve/acc_last``, the mean accuracy of the last epochs so far;
    for another kind of problem its metrics, such as ``curve/map`` and ``curve/map_last``.
    It only watches: nothing may be selected on these numbers, neither a checkpoint nor an epoch nor a setting. The
    accuracies it averages are in checkpoints, so that a resumed run logs what the undisturbed one would have. With
    ``Trainer(limit_test_batches=0)`` it does nothing.

    Several processes: each evaluates its share of the test set, and the sums are added up.

    Args:
        last: how many epochs ``curve/acc_last`` averages over.

    Raises:
        ValueError: where ``last`` is below 1, or a fit has no data module with a test set.
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
        if stage == "fit" and trainer.current_epoch == 0:  # before a checkpoint brings its own
            self._accuracies = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.limit_test_batches == 0:  # type: ignore[attr-defined]
            return
        data = getattr(trainer, "datamodule", None)
        if data is None:
            raise ValueError(
                "TestCurve takes the test set from a data module, got a fit without one: give datamodule=..."
            )
        data.setup("test")  # Lightning has set a user's own module up for the fit alone
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
