"""The record of a pool: which sample was queried in which round, its answer, and who gave it."""

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

UNKNOWN = "unknown"  # the answer for a sample of no known class
VERSION = 1


class PoolView(NamedTuple):
    """What a strategy may know of a pool: everything but the labels of samples that were not queried.

    Attributes:
        unlabelled: int64 ``[U]``, ascending: the samples to choose from, in the order of the scores.
        known: int64 ``[L]``, ascending: the labelled samples of known classes.
        known_target: int64 ``[L]``, their classes, 0 to K-1.
        unknown: int64 ``[J]``, ascending: the samples whose answer is "unknown", of no known class.
        num_known: K.
        round: number of the round, from 0.
        precision: share of known classes in the answers of the latest query; 0 in the first round.
        labelled_scores: the scores of the samples ``known``, for strategies with ``needs_labelled``; a dict of tensors
            whose first dimension is ``L``. Empty for others.
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
    """The samples that a strategy chose for labelling, the best first.

    Attributes:
        index: int64 ``[n]``, samples of ``PoolView.unlabelled``, each once.
        score: float64 ``[n]``, the score of each by the strategy; NaN where there is none.
        loss_weight: float64 ``[n]`` or ``None``; only for samples that were drawn at random. The sum of the losses of
            the query, each multiplied by its weight, estimates the sum over the pool.
    """

    index: np.ndarray  # type: ignore[assignment]  # hides the method tuple.index
    score: np.ndarray
    loss_weight: np.ndarray | None = None


@dataclass
class PoolRecord:
    """All queries and answers of a pool, stored in one JSON file, from which an interrupted run goes on.

    Each entry of ``queries`` is one sample: ``round``, ``index`` (position in the full training array), ``path`` if the
    sample is a file, ``score``, ``predicted`` (class name), ``loss_weight`` if the strategy gave one (see ``Query``),
    ``answer`` (a class name, ``"unknown"``, or ``None`` without an answer) and ``by`` (``"oracle"`` or ``"person"``).
    If an answer was changed or removed, ``history`` has the earlier ones: entries ``answer`` and ``by``, the oldest
    first. If image files were added or removed since the query, ``index`` is the present position of the file, below 0
    if it is gone, and ``asked_as`` lists its earlier positions.

    Args:
        path: the file, ``RUN/pool.json``.
        settings: what identifies the pool: classes, seeds, sizes; compared when a run goes on. ``new_classes`` are the
            classes that were added together with answers.
        queries: the queried samples, in the order of the queries.
        results: one entry for each finished round, see ``pool.label_curves.curves``.
    """

    path: Path
    settings: dict[str, Any] = field(default_factory=dict)
    queries: list[dict[str, Any]] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def load(cls, path: str | Path) -> PoolRecord:
        """Read the record from the file ``path``.

        Raises:
            FileNotFoundError: if it does not exist.
            ValueError: if it is damaged.
        """
        path = Path(path)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            record = cls(path, content["settings"], content["queries"], content["results"])
            if content["version"] != VERSION:
                raise ValueError(f"its version is {content['version']}, expected {VERSION}")
            for row in record.queries:
                row["round"], row["index"], row["answer"]  # a KeyError means that the file is damaged
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{path} does not exist: make a query first, with lightning-kd query, or name the run's folder"
            ) from None
        except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}, which holds the answers given so far, is damaged ({error}): restore it from a copy"
            ) from error
        return record

    def save(self) -> None:
        """Write the file; when this returns, it is complete and on the disk.

        Raises:
            ValueError: if the file holds a query or an answer that this record lacks, which would be lost.
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

    # -- queries and answers -----------------------------------------------------------------------------------------

    @property
    def round(self) -> int:
        """Number of the next query's round, that is, the number of queries made so far."""
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
        """Add a query; ``save`` writes it to the file.

        Args:
            index: ``[n]``, positions in the full training array.
            score: ``[n]``; values that are not finite are stored as ``None``.
            predicted: ``[n]`` class names.
            paths: ``[n]`` paths of the images, if they are files.
            loss_weight: ``[n]``, see ``Query``.

        Raises:
            ValueError: if a sample was queried before.
        """
        before = {row["index"] for row in self.queries}
        again = [int(i) for i in index if int(i) in before]
        if again:
            raise ValueError(f"index {again[0]} was queried before: query each sample once")
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
        """Add answers (class names or ``"unknown"``) by index to entries without one; ``save`` writes them."""
        for row in self.queries:
            if row["answer"] is None and row["index"] in answers:
                row |= {"answer": answers[row["index"]], "by": by}

    def correct_answers(self, answers: Mapping[int, str | None], by: str) -> None:
        """Replace existing answers by index, or remove them with ``None``; ``save`` writes the changes.

        The old answers are kept in the ``history`` of the entries.
        """
        for row in self.queries:
            if row["answer"] is not None and row["index"] in answers and answers[row["index"]] != row["answer"]:
                row.setdefault("history", []).append({"answer": row["answer"], "by": row["by"]})
                new = answers[row["index"]]
                row |= {"answer": new, "by": None if new is None else by}

    def add_classes(self, names: Sequence[str]) -> None:
        """Add known classes, after the others; ``save`` writes them."""
        for setting in ("classes", "new_classes"):
            self.settings[setting] = [*self.settings.get(setting, []), *names]


def pool_file(path: str | Path) -> Path:
    """The path of ``pool.json``, from its own path or from that of its run folder."""
    path = Path(path)
    return path / "pool.json" if path.is_dir() else path


def missing_rows(record: PoolRecord, other: PoolRecord) -> list[dict[str, Any]]:
    """The entries of ``record`` that ``other`` lacks, or whose answer it has neither as the answer nor in a history."""

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
    """A lock on the pool in ``folder`` against other commands; it ends with the process that holds it.

    Raises:
        ValueError: if another command holds the lock, or the lock file is a symbolic link.
        OSError: if the folder cannot be written.
    """
    refusal = f"another command works on the pool in {folder}: wait until it has ended"
    return file_writing.alone(folder / ".pool.lock", refusal)


def _rows(rows: list[dict[str, Any]]) -> list[str]:
    return [json.dumps(row, ensure_ascii=False) + ("," if k + 1 < len(rows) else "") for k, row in enumerate(rows)]
