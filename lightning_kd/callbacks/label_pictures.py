"""A callback that draws the scores of the training labels and the reliability diagram during training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn

from lightning_kd.argument_checks import check_numbers
from lightning_kd.callbacks._curve_metrics import evaluate
from lightning_kd.callbacks.label_figures import label_score_figure, reliability_figure
from lightning_kd.file_writing import written_whole
from lightning_kd.metrics import Reliability

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class LabelPictures(L.Callback):
    """Draw the scores of the training labels with their mixture, and the reliability diagram.

    It writes ``label_scores.png`` and ``reliability.png`` into ``pictures`` of the run folder at the end of the fit,
    files such as ``label_scores_epoch010.png`` in between, and figures for loggers that take them (TensorBoard). A task
    without ``label_scores()`` gets the reliability diagram alone. A picture that cannot be drawn gives a warning and
    does not stop the training.

    Several processes: all evaluate, process 0 draws.

    Args:
        every: also draw every so many epochs. Default: only at the end.
        split: the split of the reliability diagram, ``"test"`` or ``"val"``. A validation split of a training set with
            wrong labels has wrong labels too.

    Raises:
        ValueError: for an argument out of range.
    """

    def __init__(self, every: int | None = None, split: Literal["test", "val"] = "test") -> None:
        check_numbers(least=1, whole=True, optional=True, every=every)
        if split not in ("test", "val"):
            raise ValueError(f"split must be 'test' or 'val', got {split!r}")
        self.every = every
        self.split = split

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        epochs = trainer.current_epoch + 1
        if self.every is not None and epochs % self.every == 0:
            self._draw(trainer, pl_module, epochs, f"_epoch{epochs:03d}")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # not in on_fit_end: there the module is no longer on its device
        self._draw(trainer, pl_module, trainer.current_epoch, "")

    def _draw(self, trainer: L.Trainer, pl_module: Any, epochs: int, suffix: str) -> None:
        if getattr(trainer, "fast_dev_run", 0):
            return
        when = f"after {epochs} epoch{'' if epochs == 1 else 's'}"

        def reliability() -> Reliability:
            loader = getattr(trainer.datamodule, f"{self.split}_dataloader")()  # type: ignore[attr-defined]
            metrics = evaluate(trainer, pl_module, loader, getattr(trainer, f"limit_{self.split}_batches"))
            metrics.compute()
            return metrics["calibration"].reliability  # type: ignore[return-value]

        pictures: list[tuple[str, Callable[[], Any], Callable[[Any], Figure]]] = []
        if "calibration" in pl_module.problem.curve_metrics():
            title = f"Reliability ({self.split} set) {when}"
            pictures.append(("reliability", reliability, lambda x: reliability_figure(x, title)))
        if hasattr(pl_module, "label_scores"):
            pictures.append(
                ("label_scores", pl_module.label_scores, lambda x: label_score_figure(x, f"Label scores {when}"))
            )
        for name, measure, draw in pictures:
            try:
                measured = measure()  # collective; process 0 alone may fail afterwards
                if trainer.is_global_zero:
                    _keep(trainer, name, suffix, draw(measured))
            except Exception as error:  # a training must not fail because of a picture
                rank_zero_warn(f"no picture {name} {when} ({type(error).__name__}: {error}); the training goes on")


def _keep(trainer: L.Trainer, name: str, suffix: str, figure: Figure) -> None:
    """Write the figure as a PNG file, and give it to loggers that take figures."""
    path = Path(trainer.default_root_dir) / "pictures" / f"{name}{suffix}.png"
    with written_whole(path) as part:
        figure.savefig(part, format="png", metadata={"Software": None})
    for logger in trainer.loggers:
        experiment: Any = getattr(logger, "experiment", None)
        if hasattr(experiment, "add_figure"):
            experiment.add_figure(f"pictures/{name}", figure, global_step=trainer.global_step)
