"""The record of a pool: which sample was asked for in which round, and what was answered by whom."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lightning_kd import file_writing
from lightning_kd.file_writing import write_text

__all__ = ["UNKNOWN", "PoolRecord", "PoolView", "Query", "alone", "missing_rows", "pool_file"]

UNKNOWN = "unknown"  # the answer for a sample of none of the known classes
VERSION = 1


class PoolView(NamedTuple):
    """What a strategy may know of a pool: everything but the labels of what was not asked for.

    Attributes:
        unlabelled: int64 ``[U]``, ascending: the samples to choose from, in the order of the scores.
        known: int64 ``[L]``, ascending: the labelled samples of known classes.
        known_target: int64 ``[L]``, their classes, 0 to K-1.
        unknown: int64 ``[J]``, ascending: the samples that were asked for and belong to no known class.
        num_known: K.
        round: number of the round, from 0.
        precision: share of known classes in the answers of the round before; 0 in the first round.
        labelled_scores: what the task gives for the samples ``known``, for strategies with ``needs_labelled``; arrays
            by name, first dimension ``L``.
    """

    unlabelled: np.ndarray
    known: np.ndarray
    known_target: np.ndarray
    unknown: np.ndarray
    num_known: int
    round: int = 0
    precision: float = 0.0
    labelled_scores: Mapping[str, Any] = {}


class Query(NamedTuple):
    """What a strategy chose, the best first.

    Attributes:
        index: int64 ``[n]``, samples of ``PoolView.unlabelled``, each once.
        score: float64 ``[n]``: why, in the strategy's own unit.
        loss_weight: float64 ``[n]`` where they were drawn by chance: what the loss of each counts, so that the sum over
            all of them estimates that over the pool.
    """

    index: np.ndarray  # type: ignore[assignment]  # tuple.index gives way
    score: np.ndarray
    loss_weight: np.ndarray | None = None


@dataclass
class PoolRecord:
    """All that was asked and answered, in one file that a person can read: the truth when a run starts again.

    Each entry of ``queries`` is one sample: ``round``, ``index`` (position in the full training array), ``path`` where
    there is one, ``score``, ``predicted`` (class name), ``loss_weight`` where the strategy gave one (see ``Query``),
    ``answer`` (a class name, ``"unknown"``, or ``None`` as long as nobody answered) and ``by`` (``"oracle"`` or
    ``"person"``). Where an answer was changed or taken back, ``history`` holds what was there before: entries
    ``answer`` and ``by``, the oldest first. Where image files have come or gone, ``index`` is where the file is now,
    below 0 where it is gone, and ``asked_as`` lists where it was.

    Args:
        path: the file, ``RUN/pool.json``.
        settings: what makes this pool this pool: classes, seeds, sizes; compared when a run goes on. ``new_classes``
            are those of its classes that came with answers.
        queries: the samples asked for, in the order they were asked for.
        results: what each finished round reached.
    """

    path: Path
    settings: dict[str, Any] = field(default_factory=dict)
    queries: list[dict[str, Any]] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def load(cls, path: str | Path) -> PoolRecord:
        """Read the file.

        Raises:
            FileNotFoundError: where it does not exist.
            ValueError: where it is damaged: it is never replaced by an empty one.
        """
        path = Path(path)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            record = cls(path, content["settings"], content["queries"], content["results"])
            if content["version"] != VERSION:
                raise ValueError(f"its version is {content['version']}, expected {VERSION}")
            for row in record.queries:
                row["round"], row["index"], row["answer"]  # or a KeyError tells that it is damaged
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{path} does not exist: ask for labels first, with lightning-kd query, or name the run's folder"
            ) from None
        except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}, which holds the answers given so far, is damaged ({error}): bring back a copy of it"
            ) from error
        return record

    def save(self) -> None:
        """Write the file, so that it is whole and on the disk when this returns.

        Raises:
            ValueError: where the file holds a question or an answer that this record lacks: none is ever lost.
        """
        if self.path.is_file():
            lost = missing_rows(PoolRecord.load(self.path), self)
            if lost:
                raise ValueError(f"{self.path} has rows that would be lost, such as {lost[0]}: read it again first")
        lines = [
            "{",
            f'"version": {VERSION},',
            f'"settings": {json.dumps(self.settings, ensure_ascii=False)},',
            '"results": [',
        ]
        lines += _rows(self.results)
        lines += ["],", '"queries": [']
        lines += _rows(self.queries)
        lines += ["]", "}"]
        write_text(self.path, "\n".join(lines) + "\n", durable=True)

    # -- what was asked and answered ---------------------------------------------------------------------------------

    @property
    def round(self) -> int:
        """Number of the round to ask for next: queries made so far."""
        return 1 + max((int(row["round"]) for row in self.queries), default=-1)

    @property
    def pending(self) -> list[dict[str, Any]]:
        """The entries without an answer."""
        return [row for row in self.queries if row["answer"] is None]

    @property
    def precision(self) -> float:
        """Share of known classes in the answers of the latest query that has any; 0 without one."""
        answered = [row for row in self.queries if row["answer"] is not None]
        if not answered:
            return 0.0
        latest = max(row["round"] for row in answered)
        last = [row["answer"] != UNKNOWN for row in answered if row["round"] == latest]
        return sum(last) / len(last)

    def add_query(
        self,
        index: Sequence[int] | np.ndarray,
        score: Sequence[float] | np.ndarray,
        predicted: Sequence[str],
        paths: Sequence[str] | None = None,
        loss_weight: Sequence[float] | np.ndarray | None = None,
    ) -> None:
        """Note a new query. Nothing is written to the disk yet.

        Raises:
            ValueError: where a sample was asked for before.
        """
        before = {row["index"] for row in self.queries}
        again = [int(i) for i in index if int(i) in before]
        if again:
            raise ValueError(f"index {again[0]} was asked for before: a sample is bought once")
        number = self.round
        for k, i in enumerate(index):
            value = float(score[k])
            row: dict[str, Any] = {"round": number, "index": int(i)}
            if paths is not None:
                row["path"] = paths[k]
            row |= {"score": value if math.isfinite(value) else None, "predicted": predicted[k]}
            if loss_weight is not None:
                row["loss_weight"] = float(loss_weight[k])
            self.queries.append(row | {"answer": None, "by": None})

    def add_answers(self, answers: Mapping[int, str], by: str) -> None:
        """Note the answers to pending entries by index. Nothing is written to the disk yet."""
        for row in self.queries:
            if row["answer"] is None and row["index"] in answers:
                row |= {"answer": answers[row["index"]], "by": by}

    def correct_answers(self, answers: Mapping[int, str | None], by: str) -> None:
        """Change the answers to answered entries by index, or take them back with ``None``; the old ones are kept in
        their ``history``. Nothing is written to the disk yet."""
        for row in self.queries:
            if row["answer"] is not None and row["index"] in answers and answers[row["index"]] != row["answer"]:
                row.setdefault("history", []).append({"answer": row["answer"], "by": row["by"]})
                new = answers[row["index"]]
                row |= {"answer": new, "by": None if new is None else by}

    def add_classes(self, names: Sequence[str]) -> None:
        """Let these be known classes from now on, after the others. Nothing is written to the disk yet."""
        for setting in ("classes", "new_classes"):
            self.settings[setting] = [*self.settings.get(setting, []), *names]


def pool_file(path: str | Path) -> Path:
    """The ``pool.json`` that is meant by its own path or by that of its run folder."""
    path = Path(path)
    return path / "pool.json" if path.is_dir() else path


def missing_rows(record: PoolRecord, other: PoolRecord) -> list[dict[str, Any]]:
    """The rows of ``record`` that ``other`` lacks, or does not know the answer to, as it is or in its history."""

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["round"], row.get("path", row["index"])

    def is_kept(row: dict[str, Any]) -> bool:
        found = there.get(key(row))
        if found is None:
            return False
        old, new = row.get("history", []), found.get("history", [])
        latest = new[len(old)] if len(new) > len(old) else found
        return bool(new[: len(old)] == old and row["answer"] in (None, latest["answer"]))

    there = {key(row): row for row in other.queries}
    return [row for row in record.queries if not is_kept(row)]


def alone(folder: Path) -> AbstractContextManager[None]:
    """Keep other commands from the pool in ``folder``; a process that dies lets go of it.

    Raises:
        ValueError: where another command works on it, or the lock is a symbolic link.
        OSError: where the folder may not be written.
    """
    refusal = f"another command works on the pool in {folder}: wait until it has ended"
    return file_writing.alone(folder / ".pool.lock", refusal)


def _rows(rows: list[dict[str, Any]]) -> list[str]:
    return [json.dumps(row, ensure_ascii=False) + ("," if k + 1 < len(rows) else "") for k, row in enumerate(rows)]
