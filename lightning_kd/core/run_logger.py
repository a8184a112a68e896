"""The metrics of a run in one CSV file, a row an epoch."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from lightning_kd.file_writing import written_whole

__all__ = ["RunLogger"]


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
        with written_whole(self.file) as partial, partial.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, columns)
            writer.writeheader()
            writer.writerows(self.rows)
