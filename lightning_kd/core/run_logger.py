"""A logger that writes the metrics of a run into one CSV file, a row for each epoch."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from lightning_kd.file_writing import written_whole

__all__ = ["RunLogger"]


class RunLogger(Logger):
    """Writes ``metrics.csv``: columns ``epoch``, ``step`` and the metrics, one row for each epoch.

    Unlike Lightning's CSVLogger it keeps the rows of earlier commands in the same folder; a resumed fit removes those
    of the epoch that it repeats, and of later ones.

    Args:
        path: the run folder.

    Attributes:
        evaluated: ``(epoch, steps)`` of the evaluated checkpoint in validate and test, for which a Trainer counts from
            0; ``None`` in a fit.
        epoch: the present epoch of the fit, for callbacks that log without it.
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
            self._rows = _read(self.file) if self.file.is_file() else []
        return self._rows

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the configuration is in ``config.yaml``."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        values: dict[str, Any] = {k: v for k, v in metrics.items() if k != "epoch"}
        if not values:
            return
        row = {"epoch": int(metrics.get("epoch", self.epoch)), "step": int(step or 0)}
        last = self.rows[-1] if self.rows else {}
        if self.evaluated is not None:
            epoch, steps = self.evaluated
            # a fit logs the number of batches, a checkpoint holds optimizer steps: two networks make two in a batch
            same_epoch = str(last.get("epoch")) == str(epoch)
            row = {"epoch": epoch, "step": int(float(last["step"])) if same_epoch else steps - 1}
        same = all(str(last.get(k)) == str(v) for k, v in row.items()) and not values.keys() & last.keys()
        if same:
            last.update(values)
        else:
            self.rows.append({**row, **values})
        # with one row for each epoch, rewriting the whole file is cheap, and it is never left incomplete
        self._write()

    def rows_with(self, values: Mapping[str, float], epoch: int, step: int) -> list[dict[str, Any]]:
        """The rows including ``values`` that are not logged yet, for a checkpoint."""
        if not values:
            return [dict(row) for row in self.rows]
        rows = [dict(row) for row in self.rows]
        if rows and _place(rows[-1]) == (epoch, step):
            return [*rows[:-1], {**rows[-1], **values}]
        return [*rows, {"epoch": epoch, "step": step, **values}]

    @rank_zero_only
    def begin(self, epoch: int, saved: Sequence[Mapping[str, Any]] = ()) -> None:
        """Remove the rows of ``epoch`` and later ones at the start of a fit, and add those of its checkpoint.

        Args:
            epoch: the first epoch that is trained now.
            saved: the rows in the checkpoint. The file may lack the last one, or be damaged; it may also have metrics
                that later tests have added.
        """
        self.epoch = epoch
        try:
            before = self.rows
        except ValueError as error:
            if not saved:
                raise
            kept = self.file.with_name(f"{self.file.name}.damaged")
            rank_zero_warn(f"{error}; it is renamed to {kept.name}, and a new one is written from the checkpoint")
            self.file.replace(kept)
            before = []
        rows = [row for row in before if _place(row)[0] < epoch]
        for row in [row for row in saved if _place(row)[0] < epoch]:
            same = next((k for k, other in enumerate(rows) if _place(other) == _place(row)), None)
            if same is None:
                rows = sorted([*rows, dict(row)], key=_place)
            else:
                rows[same] = {**row, **rows[same]}
        if rows != before or self._rows is None:
            self._rows = rows
            self._write()

    def _write(self) -> None:
        columns = list(dict.fromkeys(["epoch", "step", *sorted({key for row in self.rows for key in row})]))
        with written_whole(self.file) as partial, partial.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, columns)
            writer.writeheader()
            writer.writerows(self.rows)


def _place(row: Mapping[str, Any]) -> tuple[int, int]:
    return int(float(row["epoch"])), int(float(row["step"]))


def _read(file: Path) -> list[dict[str, Any]]:
    """The rows of ``metrics.csv`` as dicts, without empty fields.

    Raises:
        ValueError: if the file is damaged.
    """
    text = file.read_text(encoding="utf-8", errors="replace")
    remedy = "move it away, or put a copy in its place"
    if not text.endswith("\n"):
        raise ValueError(f"{file} is damaged (its last line is cut): {remedy}")
    header, *lines = csv.reader(text.splitlines())
    if header[:2] != ["epoch", "step"] or len(set(header)) < len(header):
        raise ValueError(f"{file} is damaged (its first line names no epoch and step): {remedy}")
    rows = []
    for number, line in enumerate(lines, 2):
        try:
            if len(line) != len(header):
                raise ValueError
            row: dict[str, Any] = {k: float(v) for k, v in zip(header, line, strict=True) if v != ""}
            row["epoch"], row["step"] = _place(row)
        except (ValueError, KeyError):
            raise ValueError(f"{file} is damaged (line {number} is no row of numbers): {remedy}") from None
        rows.append(row)
    return rows
