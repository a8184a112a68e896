"""Queries: choosing what to label next, recording it, and writing the file that a person fills in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.distributed as dist

from lightning_kd.active_learning.pool_task import PoolTask
from lightning_kd.core.distributed import gather_by_index
from lightning_kd.core.label_page import PageRow, label_page, pictures_of, write_page
from lightning_kd.core.run_callbacks import RunRecorder
from lightning_kd.core.seeding import global_seed, numpy_generator
from lightning_kd.file_writing import write_text
from lightning_kd.pool import UNKNOWN, PoolRecord, Query
from lightning_kd.spreadsheet import csv_text

__all__ = ["select_query", "write_query"]


def select_query(
    trainer: L.Trainer, task: PoolTask, data: Any, ckpt_path: str | None = None
) -> tuple[Query, dict[int, int]]:
    """Compute the scores of the pool by ``trainer.predict`` and let ``task.select`` choose a query.

    The result is the same on every process.

    Args:
        trainer: a Trainer whose fit has ended, or a new one.
        task: the method that chooses.
        data: an ``OpenSetDataModule``.
        ckpt_path: checkpoint with the weights that compute the scores. Default: the current weights of ``task``.

    Returns:
        ``(query, predicted)``: the query, and the predicted class (0 to K-1) of each of its samples by index.

    Raises:
        ValueError: if ``select`` returns anything but 1 to ``budget`` different samples of the pool.
    """
    recorders = [c for c in trainer.callbacks if isinstance(c, RunRecorder)]  # type: ignore[attr-defined]
    for recorder in recorders:
        recorder.predictions = False
    try:
        outputs: Any = trainer.predict(task, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    finally:
        for recorder in recorders:
            recorder.predictions = True
    parts = [{name: value.cpu() for name, value in output.items()} for output in outputs]
    columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    index, *values = gather_by_index(columns.pop("index"), *columns.values())
    scores = dict(zip(columns, values, strict=True))
    labelled = np.isin(index.numpy(), data.known_indices)
    rows = torch.from_numpy(~labelled & ~np.isin(index.numpy(), _open_indices(data)))
    of_labelled = {k: v[~rows] for k, v in scores.items()} if task.needs_labelled else {}
    view = data.view(index[rows].numpy(), of_labelled)
    of_pool = {name: value[rows] for name, value in scores.items()}
    query = None
    if trainer.is_global_zero:
        budget = min(data.budget, len(view.unlabelled))
        generator = numpy_generator(global_seed(), "query", data.round)
        chosen = task.select(of_pool, view, budget, generator)
        query = _check_choice(chosen, view.unlabelled, budget, task.strategy_name)
    query = trainer.strategy.broadcast(query)
    assert query is not None
    place = np.searchsorted(index.numpy(), query.index)
    predicted = scores["prediction"][torch.from_numpy(place)].tolist()
    return query, dict(zip(query.index.tolist(), predicted, strict=True))


def _check_choice(chosen: Any, pool: np.ndarray, budget: int, strategy: str) -> Query:
    score = loss_weight = None
    if isinstance(chosen, Query):
        chosen, score, loss_weight = chosen
    index = np.asarray(chosen)
    if index.ndim != 1 or index.dtype.kind not in "iu":
        raise ValueError(f"strategy {strategy} must return indices [n], got {index.dtype} {list(index.shape)}")
    if not 1 <= len(index) <= budget:
        raise ValueError(f"strategy {strategy} must return 1 to {budget} indices, got {len(index)}")
    if len(np.unique(index)) < len(index):
        raise ValueError(f"strategy {strategy} must return each index once, got {len(index)} with repeats")
    if not np.isin(index, pool).all():
        wrong = index[~np.isin(index, pool)][0]
        raise ValueError(f"strategy {strategy} must return indices of pool.unlabelled, got {wrong}")
    score = np.full(len(index), np.nan) if score is None else np.asarray(score, dtype=np.float64)
    if score.shape != index.shape:
        raise ValueError(f"strategy {strategy} must return a score for each of {len(index)} indices, got {score.shape}")
    if loss_weight is not None:
        loss_weight = np.asarray(loss_weight, dtype=np.float64)
        if loss_weight.shape != index.shape or not (np.isfinite(loss_weight) & (loss_weight > 0)).all():
            raise ValueError(f"strategy {strategy} must return a loss weight above 0 for each of {len(index)} indices")
    return Query(index.astype(np.int64), score, loss_weight)


def write_query(trainer: L.Trainer, task: PoolTask, data: Any, folder: Path, ckpt_path: str | None = None) -> Path:
    """Choose a query, record it in ``pool.json`` and write ``query_ROUND.csv`` for a person to fill in.

    The file has the columns ``index``, ``path`` if the samples have one, ``score``, ``loss_weight`` if the strategy
    gives one, ``predicted`` and an empty ``label``; the best samples first. Names that a spreadsheet would take for
    formulas have an apostrophe before them, see ``lightning_kd.spreadsheet``. If the samples are images,
    ``query_ROUND.html`` shows them; a person chooses labels there by mouse or keys, and the page saves the same CSV.

    Samples of earlier queries that have no answer yet come again, after the new ones.

    Args:
        trainer: see ``select_query``, as ``task``, ``data`` and ``ckpt_path``.
        task: likewise.
        data: likewise.
        folder: the run folder.
        ckpt_path: likewise.

    Returns:
        The path of the CSV file.

    Raises:
        ValueError: if the latest query has no answer at all, if every sample left in the pool waits for an answer, or
            if a strategy with ``single_query`` has made its query.
    """
    data.setup("predict")
    file = folder / "pool.json"
    record = PoolRecord.load(file) if file.is_file() else PoolRecord(file)
    data.set_record(record)
    if _waits(record):
        path = folder / f"query_{record.round - 1:02d}.csv"
        if not path.is_file():  # an earlier command stopped after saving the record, before writing this file
            if trainer.is_global_zero:
                record.save()
                _write_files(path, _to_ask(record), data)
            return path
        raise ValueError(
            f"{len(_to_ask(record))} samples of {path.name} wait for an answer: fill in the column label and run "
            f"lightning-kd label {path} first"
        )
    weighed = sum("loss_weight" in row for row in record.queries)
    if task.single_query and weighed:
        raise ValueError(
            f"{task.strategy_name} makes one query, with the whole budget, and {file} holds that query of {weighed} "
            "samples: train on those, or name another --run folder"
        )
    asked = _open_indices(data)
    if len(asked) and not len(np.setdiff1d(data.unlabelled_indices, asked)):
        raise ValueError(
            f"all {len(asked)} samples that are left in the pool wait for an answer: find their queries in {file}, "
            "where answer is null, and run lightning-kd label with the files of those queries"
        )
    query, predicted = select_query(trainer, task, data, ckpt_path)
    number = record.round
    record.results.append(start_result(task, data, number))
    add_query(record, data, query, predicted)
    path = folder / f"query_{number:02d}.csv"
    if trainer.is_global_zero:
        record.save()
        _write_files(path, _to_ask(record), data)
    wait_for_all()
    return path


def _to_ask(record: PoolRecord) -> list[dict[str, Any]]:
    """The entries without an answer, the latest query first; not those whose image file is gone."""
    return sorted((row for row in record.pending if row["index"] >= 0), key=lambda row: -row["round"])


def _waits(record: PoolRecord) -> bool:
    """Whether the latest query has no answer at all, though a sample of it is still there."""
    latest = [row for row in record.queries if row["round"] == record.round - 1]
    return all(row["answer"] is None for row in latest) and any(row["index"] >= 0 for row in latest)


def _open_indices(data: Any) -> np.ndarray:
    """Positions of the samples that were queried and have no answer yet."""
    rows = [] if data.record is None else _to_ask(data.record)
    return np.array([row["index"] for row in rows], dtype=np.int64)


def start_result(task: PoolTask, data: Any, number: int) -> dict[str, Any]:
    """The first entries of the result of round ``number``: strategy, seed, and the sizes of the pool's parts."""
    return {
        "round": number,
        "strategy": task.strategy_name,
        "seed": global_seed(),
        "known": len(data.known_indices),
        "unknown": len(data.unknown_indices),
        "unlabelled": len(data.unlabelled_indices),
    }


def add_query(record: PoolRecord, data: Any, query: Query, predicted: dict[int, int]) -> None:
    """Add a query and the predicted classes of its samples to ``record``."""
    indices = query.index.tolist()
    paths = [data.path_of(i) for i in indices]
    names = [data.class_names[predicted[i]] for i in indices]
    record.add_query(indices, query.score, names, None if None in paths else paths, query.loss_weight)


def _write_files(path: Path, rows: list[dict[str, Any]], data: Any) -> None:
    """Write the page and then the CSV ``path`` for the entries ``rows`` of a record.

    The CSV comes last because its presence means that the query is complete.
    """
    names: list[str] = [name for name in ("index", "path", "score", "loss_weight", "predicted") if name in rows[0]]
    cells = []
    for row in rows:
        shown: dict[str, str] = {
            k: "" if row[k] is None else f"{row[k]:.6g}" for k in ("score", "loss_weight") if k in row
        }
        cells.append([shown[name] if name in shown else row.get(name, "") for name in names])
    write_page(path.with_suffix(".html"), lambda: _page(path.name, names, cells, data))
    write_text(path, csv_text([[*names, "label"], *([*row, ""] for row in cells)]), durable=True)


def _page(file_name: str, names: list[str], cells: list[list[Any]], data: Any) -> str:
    facts = [[(name, str(value)) for name, value in zip(names, row, strict=True)] for row in cells]
    if "path" in names:
        facts = [[row[1], row[0], *row[2:]] for row in facts]
        place = {data.path_of(i): i for i in data.unlabelled_indices.tolist()}  # files may have been added or removed
        indices = [place[row[1]] for row in cells]
    else:
        indices = [row[0] for row in cells]
    rows = [
        PageRow(row, picture, fact, row[-1])
        for row, picture, fact in zip(cells, pictures_of(data, indices), facts, strict=True)
    ]
    command = f"lightning-kd label {file_name} --run RUN"
    return label_page(
        "what to label next",
        rows,
        [*names, "label"],
        data.class_names,
        file_name=file_name,
        command=command,
        none=UNKNOWN,
    )


def wait_for_all() -> None:
    """Wait until every process has come to this line; do nothing where no other processes were started."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
