"""The run folder: everything a command leaves behind, in one place without version numbers.

``config.yaml``, ``run.json``, ``metrics.csv``, ``checkpoints/last.ckpt`` and ``best.ckpt``, exported networks,
``predictions.csv``, and what a family adds.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from lightning_kd import __version__
from lightning_kd.core.distributed import gather_by_index
from lightning_kd.core.task import Task

__all__ = ["RunFolder", "RunLogger", "RunRecorder", "run_callbacks", "run_folder_of"]


def write_text(path: Path, text: str) -> None:
    """Write all or nothing: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)


class RunFolder:
    """Paths of one run and its ``run.json``.

    Args:
        path: the folder; made when something is written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.last = self.path / "checkpoints" / "last.ckpt"
        self.best = self.path / "checkpoints" / "best.ckpt"
        self.metrics = self.path / "metrics.csv"
        self.noise = self.path / "noise.npz"
        self.pool = self.path / "pool.json"
        self.record_file = self.path / "run.json"
        self.record: dict[str, Any] = {}

    def checkpoint(self, name: str) -> Path:
        """The path of ``last`` or ``best``.

        Raises:
            FileNotFoundError: where it does not exist yet.
        """
        path = {"last": self.last, "best": self.best}[name]
        if not path.is_file():
            raise FileNotFoundError(
                f"ckpt_path {name!r}: there is no {path}; leave --ckpt_path out to start anew, or name the folder of "
                "an earlier fit with --run"
            )
        return path

    def clear(self) -> None:
        """Remove what an earlier fit left: checkpoints, exported networks (``*.pt``), metrics, predictions, reports."""
        for name in ("checkpoints", "pictures"):
            shutil.rmtree(self.path / name, ignore_errors=True)
        names = ["metrics.csv", "predictions.csv", "noisy_labels.csv", "wrong_labels.csv", "noise.npz", "traceback.txt"]
        names += ["shifts.json", "shift.json", "sharpness.json"]
        for path in [*self.path.glob("*.pt"), *(self.path / name for name in names)]:
            path.unlink(missing_ok=True)

    def begin(self, verb: str, command: str, seed: int | None) -> None:
        """Write ``run.json`` with outcome ``running``; earlier commands move to its ``history``."""
        if self.path.exists() and not self.path.is_dir():
            raise NotADirectoryError(f"--run {str(self.path)!r} is a file: name a folder")
        try:
            earlier = json.loads(self.record_file.read_text()) if self.record_file.is_file() else {}
        except json.JSONDecodeError as error:
            raise ValueError(f"{self.record_file} is damaged ({error}): remove it, the run needs it no more") from error
        history = earlier.pop("history", [])
        packages = ("torch", "torchvision", "lightning", "torchmetrics", "numpy")
        self.record = {
            "verb": verb,
            "command": command,
            "seed": seed,
            "versions": {"lightning-kd": __version__, **{name: version(name) for name in packages}},
            "start": _now(),
            "end": None,
            "outcome": "running",
            "history": [*history, earlier] if earlier else history,
        }
        self._write_record()

    def end(self, outcome: str, **details: Any) -> None:
        """Note the outcome (``finished``, ``failed`` or ``interrupted``) and what was reached."""
        self.record.update(end=_now(), outcome=outcome, **details)
        self._write_record()

    def _write_record(self) -> None:
        write_text(self.record_file, json.dumps(self.record, indent=2) + "\n")


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


class RunLogger(Logger):
    """Metrics of a run in ``metrics.csv``: columns ``epoch``, ``step`` and the metrics, one row per epoch.

    Unlike Lightning's CSVLogger it keeps the rows of earlier commands in the same folder; a resumed fit drops those
    of the epoch that it repeats, and of later ones.

    Args:
        path: the run folder.

    Attributes:
        evaluated: epoch and number of steps of the checkpoint that is evaluated, outside of a fit; a Trainer that only
            evaluates counts from 0.
        epoch: of the fit, for callbacks that log without it.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.file = Path(path) / "metrics.csv"
        self.evaluated: tuple[int, int] | None = None
        self.epoch = 0
        self._rows: list[dict[str, Any]] | None = None

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.file.parent)

    @property
    def root_dir(self) -> str:
        return self.save_dir

    @property
    @rank_zero_experiment
    def experiment(self) -> RunLogger:
        return self

    @property
    def rows(self) -> list[dict[str, Any]]:
        if self._rows is None:
            self._rows = []
            if self.file.is_file():
                with self.file.open(newline="") as stream:
                    self._rows = [{k: v for k, v in row.items() if v != ""} for row in csv.DictReader(stream)]
        return self._rows

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The configuration is in ``config.yaml``."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        values: dict[str, Any] = {k: v for k, v in metrics.items() if k != "epoch"}
        if not values:
            return
        row = {"epoch": int(metrics.get("epoch", self.epoch)), "step": int(step or 0)}
        last = self.rows[-1] if self.rows else {}
        if self.evaluated is not None:
            epoch, steps = self.evaluated
            # Lightning counts batches in a fit, but steps in its checkpoints: two networks may take two a batch
            same_epoch = str(last.get("epoch")) == str(epoch)
            row = {"epoch": epoch, "step": int(float(last["step"])) if same_epoch else steps - 1}
        same = all(str(last.get(k)) == str(v) for k, v in row.items()) and not values.keys() & last.keys()
        if same:
            last.update(values)
        else:
            self.rows.append({**row, **values})
        # one row per epoch: rewriting the file whole is cheap, and never leaves it torn
        self._write()

    @rank_zero_only
    def drop_from(self, epoch: int) -> None:
        """Forget the rows of ``epoch`` and later ones."""
        kept = [row for row in self.rows if int(float(row["epoch"])) < epoch]
        if len(kept) < len(self.rows):
            self._rows = kept
            self._write()

    def _write(self) -> None:
        columns = list(dict.fromkeys(["epoch", "step", *sorted({key for row in self.rows for key in row})]))
        self.file.parent.mkdir(parents=True, exist_ok=True)
        partial = self.file.with_name("metrics.csv.partial")
        with partial.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, columns)
            writer.writeheader()
            writer.writerows(self.rows)
        os.replace(partial, self.file)


class RunRecorder(L.Callback):
    """Keeps the run folder true while the Trainer works: resume, exports, predictions.

    Args:
        run: the run folder.

    Attributes:
        predictions: whether to write ``predictions.csv``; a pass that is made for something else turns it off.
    """

    def __init__(self, run: RunFolder) -> None:
        self.run = run
        self.predictions = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, RunLogger):
                logger.drop_from(trainer.current_epoch)
                logger.epoch = trainer.current_epoch
        saving = any(isinstance(c, RunCheckpoint) for c in trainer.checkpoint_callbacks)
        # one answer for all: saving is a collective call, and the file may appear while a rank looks
        if trainer.strategy.broadcast(saving and not self.run.last.is_file()):
            # whatever breaks in the first epoch, there is something to go on from
            trainer.save_checkpoint(self.run.last)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
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

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # not on_fit_end: by then the module has left the device
        if isinstance(pl_module, Task) and not getattr(trainer, "fast_dev_run", 0):
            pl_module.write_results(self.run.path)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if isinstance(pl_module, Task) and trainer.is_global_zero and not getattr(trainer, "fast_dev_run", 0):
            for name, network in pl_module.exports().items():
                path = self.run.path / f"{name}.pt"
                partial = path.with_suffix(".partial")
                torch.save({k: v.detach().cpu().contiguous() for k, v in network.state_dict().items()}, partial)
                os.replace(partial, path)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._parts: list[dict[str, torch.Tensor]] = []

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        if not self.predictions:
            return
        if "index" not in outputs:
            raise ValueError("predictions.csv needs each sample's index: predict on a lightning_kd data module")
        self._parts.append({name: outputs[name].cpu() for name in ("index", "prediction", "probabilities")})

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.predictions:
            return
        index, prediction, probabilities = (
            torch.cat([part[name] for part in self._parts]) for name in ("index", "prediction", "probabilities")
        )
        self._parts = []
        index, prediction, probabilities = gather_by_index(index, prediction, probabilities)
        if trainer.is_global_zero:
            header = ["index", "prediction", *(f"probability_{k}" for k in range(probabilities.shape[1]))]
            lines = [",".join(header)]
            for i, p, row in zip(index.tolist(), prediction.tolist(), probabilities.tolist(), strict=True):
                lines.append(f"{i},{p}," + ",".join(f"{value:.6g}" for value in row))
            write_text(self.run.path / "predictions.csv", "\n".join(lines) + "\n")


def run_folder_of(trainer: L.Trainer | None) -> RunFolder | None:
    """The run folder that ``trainer`` works in; ``None`` where it has none."""
    callbacks = getattr(trainer, "callbacks", [])
    return next((callback.run for callback in callbacks if isinstance(callback, RunRecorder)), None)


class RunCheckpoint(ModelCheckpoint):
    """One file of the run folder, overwritten; it tolerates a user's own and moves with the folder."""

    @property
    def state_key(self) -> str:
        return f"{type(self).__name__}[{self.filename}]"

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        moved = {**state_dict}
        here = str(Path(str(self.dirpath)) / f"{self.filename}.ckpt")
        if Path(here).is_file() and state_dict["best_model_path"]:
            # Lightning would forget the best score of a folder that was moved, and overwrite it with a worse
            moved.update(dirpath=self.dirpath, best_model_path=here, kth_best_model_path=here)
            moved["best_k_models"] = dict.fromkeys([here], *state_dict["best_k_models"].values())
        super().load_state_dict(moved)


def run_callbacks(run: RunFolder, monitor: str = "val/acc", mode: str = "max") -> list[L.Callback]:
    """Checkpoints ``best.ckpt`` (by ``monitor``) and ``last.ckpt`` at each epoch's end, and the recorder."""
    shared: dict[str, Any] = {
        "dirpath": str(run.last.parent.absolute()),
        "save_top_k": 1,
        "save_on_train_epoch_end": True,
        "enable_version_counter": False,
        "auto_insert_metric_name": False,
    }
    # last comes second, so that it holds the first one's latest score
    best = RunCheckpoint(filename="best", monitor=monitor, mode=mode, **shared)
    return [best, RunCheckpoint(filename="last", **shared), RunRecorder(run)]
