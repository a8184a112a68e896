"""The callbacks that write a run folder: its checkpoints, and the recorder of everything else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lightning_kd.core.batch import as_batch
from lightning_kd.core.checkpoint_files import RunCheckpointIO
from lightning_kd.core.class_metrics import write_confusion
from lightning_kd.core.notes import note
from lightning_kd.core.prediction_files import PredictionWriter
from lightning_kd.core.run_folder import RunFolder
from lightning_kd.core.run_logger import RunLogger
from lightning_kd.core.task import Task
from lightning_kd.file_writing import written_whole

__all__ = ["RunCheckpoint", "RunRecorder", "run_callbacks", "run_folder_of"]


# key of the rows of metrics.csv in checkpoints
_ROWS = "lightning_kd_metrics"


class RunRecorder(L.Callback):
    """Writes the run folder while the Trainer works: metrics on resume, exported networks, predictions.

    Checkpoints, also those of other callbacks, are written by ``RunCheckpointIO`` and hold the rows of
    ``metrics.csv``. A resumed fit with no epochs left that was stopped before writing its results writes them.

    Args:
        run: the run folder.
        sort: order of the rows of ``predictions.csv``, see ``PredictionTable``.

    Attributes:
        predictions: whether ``trainer.predict`` writes predictions; set to False for passes with another purpose.
    """

    def __init__(self, run: RunFolder, sort: str = "index") -> None:
        self.run = run
        self.sort = sort
        self.predictions = True
        self._writer: PredictionWriter | None = None
        self._rows: list[dict[str, Any]] = []
        self._loaded: dict[str, Any] = {}
        self._trained = self._ended = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._rows, self._trained, self._ended = [], False, stage == "fit" and self.run.fit_is_finished()
        problem: Any = getattr(pl_module, "problem", None)
        if self.sort != "index" and problem is not None and not hasattr(problem.prediction_writer(), "sort"):
            raise ValueError(f"sort must be 'index' for {problem.kind}, got {self.sort!r}: leave it out")
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # a user's own is not replaced
            trainer.strategy.checkpoint_io = RunCheckpointIO()

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        connector = trainer._logger_connector
        # at the end of an epoch Lightning logs the training metrics only after the checkpoint is written
        pending = connector.metrics["log"] if trainer._results and connector._first_loop_iter is None else {}
        values = {name: float(value) for name, value in pending.items()}  # type: ignore[arg-type]
        for logger in trainer.loggers:
            if isinstance(logger, RunLogger):
                step = trainer.fit_loop.epoch_loop._batches_that_stepped - 1  # as Lightning counts steps when it logs
                checkpoint[_ROWS] = logger.rows_with(values, trainer.current_epoch, step)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._loaded = checkpoint
        self._rows = list(checkpoint.get(_ROWS, []))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._trained, self._loaded = True, {}
        for logger in trainer.loggers:
            if isinstance(logger, RunLogger):
                logger.begin(trainer.current_epoch, self._rows)
        saving = any(isinstance(c, RunCheckpoint) for c in trainer.checkpoint_callbacks)
        # process 0 decides for all: saving is a collective call, and the file may appear while another one looks
        if trainer.strategy.broadcast(saving and not self.run.last.is_file()):
            # a run that is interrupted in its first epoch can be resumed from here
            trainer.save_checkpoint(self.run.last)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._note_checkpoints(trainer)
        for logger in trainer.loggers:
            if isinstance(logger, RunLogger):
                logger.epoch = trainer.current_epoch

    def _note_evaluated(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, RunLogger):
                fitting = trainer.state.fn == "fit"
                logger.evaluated = None if fitting else getattr(pl_module, "loaded_progress", None)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._note_evaluated(trainer, pl_module)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._note_evaluated(trainer, pl_module)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        table = getattr(pl_module, "confusion", None)
        if table is None or not trainer.is_global_zero or getattr(trainer, "fast_dev_run", False):
            return
        if self.run.can_be_written():  # testing works in a read-only folder too
            names = getattr(trainer.datamodule, "class_names", None) or []  # type: ignore[attr-defined]
            write_confusion(self.run.path, table, names)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # not in on_fit_end: there the module is no longer on its device
        if isinstance(pl_module, Task) and not getattr(trainer, "fast_dev_run", 0):
            pl_module.write_results(self.run.path)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not isinstance(pl_module, Task) or getattr(trainer, "fast_dev_run", False):
            return
        if not self._trained and trainer.ckpt_path is not None:
            exported = all((self.run.path / f"{name}.pt").is_file() for name in pl_module.exports())
            if trainer.strategy.broadcast(exported and self._ended):
                return  # the files are those of the finished fit; writing them again could lose an average
            self._finish_stopped_fit(trainer, pl_module)
        if trainer.is_global_zero:
            for name, network in pl_module.exports().items():
                with written_whole(self.run.path / f"{name}.pt") as path:
                    torch.save({k: v.detach().cpu().contiguous() for k, v in network.state_dict().items()}, path)
                self.run.note_files([self.run.path / f"{name}.pt"])
        self._note_checkpoints(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._note_checkpoints(trainer)

    def _note_checkpoints(self, trainer: L.Trainer) -> None:
        """Record all checkpoint files in ``run.json``, also those of a user's own callbacks."""
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint):
                paths = {callback.best_model_path, callback.last_model_path, *callback.best_k_models}
                self.run.note_files(path for path in paths if path)

    def _finish_stopped_fit(self, trainer: L.Trainer, task: Task) -> None:
        """Do what the end of a fit does, for a fit that was stopped after its last checkpoint."""
        for logger in trainer.loggers:
            if isinstance(logger, RunLogger):
                logger.begin(trainer.current_epoch, self._rows)
        task.on_load_checkpoint(self._loaded)
        # a checkpoint of a run with an average holds the average here
        task.load_state_dict(self._loaded["state_dict"], strict=task.strict_loading)
        self._loaded = {}
        task.to(trainer.strategy.root_device)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if type(callback).__module__.startswith("lightning_kd."):
                callback.on_train_end(trainer, task)
        task.cpu()

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        problem: Any = getattr(pl_module, "problem", None)
        writing = problem is not None and self.predictions and not getattr(trainer, "fast_dev_run", 0)
        self._writer = problem.prediction_writer() if writing else None
        if self._writer is not None and self.sort != "index":
            self._writer.sort = self.sort  # type: ignore[attr-defined]  # setup has checked that it exists

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        if self._writer is None:
            return
        if not isinstance(outputs, Mapping) or "index" not in outputs:
            raise ValueError(
                "predictions are written by each sample's index, got outputs without: use a lightning_kd data module"
            )
        names = getattr(pl_module, "written_outputs", None) or tuple(outputs)
        tensors = {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)}
        written = {name: value for name, value in tensors.items() if name in ("index", *names)}
        self._writer.add(self.run.path, written, as_batch(batch), trainer.datamodule)  # type: ignore[attr-defined]

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._writer is not None:
            self._writer.finish(self.run.path, trainer.datamodule)  # type: ignore[attr-defined]
            self._writer = None
            self._note_part(trainer)

    @staticmethod
    def _note_part(trainer: L.Trainer) -> None:
        """Tell the user if the predictions are of a part of the samples only."""
        done, loader = sum(trainer.num_predict_batches), trainer.predict_dataloaders
        loaders: list[Any] = list(loader) if isinstance(loader, list | tuple) else [loader]
        whole = sum(len(each) if hasattr(each, "__len__") else 0 for each in loaders)
        if done < whole:
            limit = trainer.limit_predict_batches  # type: ignore[attr-defined]
            note(
                f"predictions are of {done} of {whole} batches, as limit_predict_batches={limit}: leave it out for all"
            )


def run_folder_of(trainer: L.Trainer | None) -> RunFolder | None:
    """The run folder that ``trainer`` works in, or ``None``."""
    callbacks = getattr(trainer, "callbacks", [])
    return next((callback.run for callback in callbacks if isinstance(callback, RunRecorder)), None)


class RunCheckpoint(ModelCheckpoint):
    """A checkpoint of the run folder, always in the same file; it works beside a user's own and in a moved folder."""

    @property
    def state_key(self) -> str:
        return f"{type(self).__name__}[{self.filename}]"

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        moved = {**state_dict}
        here = str(Path(str(self.dirpath)) / f"{self.filename}.ckpt")
        if Path(here).is_file() and state_dict["best_model_path"]:
            # for a moved folder Lightning would drop the best score, and overwrite best.ckpt by a worse one
            moved.update(dirpath=self.dirpath, best_model_path=here, kth_best_model_path=here)
            moved["best_k_models"] = dict.fromkeys([here], *state_dict["best_k_models"].values())
        super().load_state_dict(moved)


def run_callbacks(run: RunFolder, monitor: str = "val/acc", mode: str = "max", sort: str = "index") -> list[L.Callback]:
    """The callbacks of a run: ``best.ckpt`` (by ``monitor``), ``last.ckpt`` (at each epoch's end), and the recorder.

    Args:
        run: the run folder.
        monitor: the metric of the best checkpoint.
        mode: ``"max"`` or ``"min"``.
        sort: see ``RunRecorder``.
    """
    shared: dict[str, Any] = {
        "dirpath": str(run.last.parent.absolute()),
        "save_top_k": 1,
        "save_on_train_epoch_end": True,
        "enable_version_counter": False,
        "auto_insert_metric_name": False,
    }
    # last.ckpt is written second, so that it stores the latest state of the first
    best = RunCheckpoint(filename="best", monitor=monitor, mode=mode, **shared)
    return [best, RunCheckpoint(filename="last", **shared), RunRecorder(run, sort)]
