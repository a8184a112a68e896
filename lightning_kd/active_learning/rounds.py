"""Rounds of training, asking and answering."""

from __future__ import annotations

import csv
import gc
import io
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_only

from lightning_kd.active_learning.pool_task import PoolTask
from lightning_kd.core.distributed import gather_by_index
from lightning_kd.core.run import RunRecorder
from lightning_kd.core.seeding import global_seed, numpy_generator
from lightning_kd.pool import UNKNOWN, PoolRecord, Query
from lightning_kd.pool.label_curves import curves, draw_curves, write_metrics
from lightning_kd.pool.pool_record import missing_rows, write_durably

__all__ = ["ask", "choose", "run_rounds"]

Objects = tuple[L.Trainer, PoolTask, Any]


def choose(trainer: L.Trainer, task: PoolTask, data: Any, ckpt_path: str | None = None) -> tuple[Query, dict[int, int]]:
    """Score the pool by ``trainer.predict`` and let the task choose; the same on every process.

    Args:
        trainer: one that has ended its fit, or a fresh one.
        task: chooses.
        data: an ``OpenSetDataModule``.
        ckpt_path: weights to score with; by default those of ``task`` as it is.

    Returns:
        The query, and the predicted class of each sample in it by index.

    Raises:
        ValueError: where the choice is not ``budget`` or fewer different samples out of the pool.
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
    rows = torch.from_numpy(~labelled)
    of_labelled = {k: v[~rows] for k, v in scores.items()} if task.needs_labelled else {}
    view = data.view(index[rows].numpy(), of_labelled)
    of_pool = {name: value[rows] for name, value in scores.items()}
    query = None
    if trainer.is_global_zero:
        budget = min(data.budget, len(view.unlabelled))
        generator = numpy_generator(global_seed(), "query", data.round)
        chosen = task.select(of_pool, view, budget, generator)
        query = _checked(chosen, view.unlabelled, budget, task.strategy_name)
    query = trainer.strategy.broadcast(query)
    assert query is not None
    place = np.searchsorted(index.numpy(), query.index)
    predicted = scores["prediction"][torch.from_numpy(place)].tolist()
    return query, dict(zip(query.index.tolist(), predicted, strict=True))


def _checked(chosen: Any, pool: np.ndarray, budget: int, strategy: str) -> Query:
    score = None
    if isinstance(chosen, Query):
        chosen, score = chosen
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
    return Query(index.astype(np.int64), score)


def ask(trainer: L.Trainer, task: PoolTask, data: Any, folder: Path, ckpt_path: str | None = None) -> Path:
    """Choose what to label next, note it in ``pool.json`` and write ``query_ROUND.csv`` for a person.

    The file has the columns ``index``, ``path`` where there is one, ``score``, ``predicted`` and an empty ``label``,
    the best first.

    Raises:
        ValueError: where an earlier query waits for answers.
    """
    data.setup("predict")
    file = folder / "pool.json"
    record = PoolRecord.load(file) if file.is_file() else PoolRecord(file)
    if record.pending:
        path = folder / f"query_{record.pending[0]['round']:02d}.csv"
        if not path.is_file():  # it broke between the record and this file
            if trainer.is_global_zero:
                write_durably(path, _query_csv(record.pending))
            return path
        raise ValueError(
            f"{len(record.pending)} samples of {path.name} wait for an answer: fill in the column label and run "
            f"lightning-kd label {path} first"
        )
    data.use(record)
    query, predicted = choose(trainer, task, data, ckpt_path)
    number = record.round
    record.results.append(_result(task, data, number))
    _note(record, data, query, predicted)
    path = folder / f"query_{number:02d}.csv"
    if trainer.is_global_zero:
        record.save()
        write_durably(path, _query_csv(record.pending))
    _wait()
    return path


def _result(task: PoolTask, data: Any, number: int) -> dict[str, Any]:
    return {
        "round": number,
        "strategy": task.strategy_name,
        "seed": global_seed(),
        "known": len(data.known_indices),
        "unknown": len(data.unknown_indices),
        "unlabelled": len(data.unlabelled_indices),
    }


def _note(record: PoolRecord, data: Any, query: Query, predicted: dict[int, int]) -> None:
    indices = query.index.tolist()
    paths = [data.path_of(i) for i in indices]
    names = [data.class_names[predicted[i]] for i in indices]
    record.ask(indices, query.score, names, None if None in paths else paths)


def _query_csv(rows: list[dict[str, Any]]) -> str:
    names = [name for name in ("index", "path", "score", "predicted") if name in rows[0]]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*names, "label"])
    for row in rows:
        score = "" if row["score"] is None else f"{row['score']:.6g}"
        writer.writerow([score if name == "score" else row[name] for name in names] + [""])
    return text.getvalue()


def run_rounds(
    start: Callable[[int, Path], Objects],
    folder: str | Path,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """The whole benchmark: train, test, query, ask the oracle, until the budget is spent; then train and test again.

    Each round works in a folder of its own, ``FOLDER/round_00`` and so on, with everything new. ``FOLDER/pool.json`` is
    the truth: started again after whatever broke, finished rounds are kept, an unfinished one is trained again from its
    seed, and the end is that of an undisturbed run. ``FOLDER/metrics.csv`` has one row a round, ``FOLDER/curves.png``
    the curves.

    Args:
        start: from the number of the round and its folder to a fresh ``(trainer, task, data)``, after
            ``seed_everything(seed + round)``.
        folder: of the whole run.
        seed: of the first round.
        say: prints a line of progress, on process 0.

    Returns:
        One entry a round, see ``pool.curves.curves``.

    Raises:
        ValueError: where the folder holds rounds of another strategy or seed, or what a person did by hand.
    """
    folder = Path(folder)
    file = folder / "pool.json"
    done = len(PoolRecord.load(file).results) if file.is_file() else 0
    number = max(done - 1, 0)  # the last one may have to ask its oracle still, or be the last no more
    while True:
        record = _round(start, folder, number, number >= done, seed, say)
        gc.collect()  # Trainer, task and data know one another, and would stay with all samples
        if len(record.results) <= number:  # it was the end of a shorter run: make it anew
            done = number
            continue
        _wait()
        if record.results[number].get("final"):
            break
        number += 1
    rows = curves(record)
    if _is_first_process():
        write_metrics(record, folder / "metrics.csv")
        draw_curves(rows, folder / "curves.png", record.results[-1]["strategy"])
    return rows


def _round(
    start: Callable[[int, Path], Objects],
    folder: Path,
    number: int,
    new: bool,
    seed: int,
    say: Callable[[str], None],
) -> PoolRecord:
    """Make a round, unless it is done; the record after it. Where the round has to be made ``new`` and is not asked
    for as such, nothing is made, and the record ends before it."""
    round_folder = folder / f"round_{number:02d}"
    if new and _is_first_process():
        remove_round(round_folder)  # what a broken one left
    L.seed_everything(seed + number, workers=True, verbose=False)
    trainer, task, data = start(number, round_folder)
    record = _settle(trainer, task, data, folder / "pool.json", seed)
    if new and len(record.results) <= number:
        _train(trainer, task, data, record, round_folder, number)
        if trainer.is_global_zero:
            record.save()  # from here on the round is done
        _answer(trainer, data, record)
        if trainer.is_global_zero:
            write_metrics(record, folder / "metrics.csv")
            say(_line(record, number, data.rounds))
    return record


def _is_first_process() -> bool:
    return getattr(rank_zero_only, "rank", 0) == 0  # also before a Trainer has started the others


def _by_hand(record: PoolRecord) -> bool:
    """Whether some of its questions were for a person."""
    ours = {row["round"] for row in record.results if "final" in row}
    return any(row["by"] == "person" or row["round"] not in ours for row in record.queries)


def forget_rounds(folder: Path) -> None:
    """Remove what ``run_rounds`` left in ``folder``.

    Raises:
        FileExistsError: where a person was asked anything in there; nothing is removed then.
    """
    file = folder / "pool.json"
    rounds = sorted(folder.glob("round_[0-9]*"))
    for own in [file, *(path / "pool.json" for path in rounds)]:
        if own.is_file() and _by_hand(PoolRecord.load(own)):
            raise FileExistsError(f"{own} holds questions to a person, which would be lost: name another --run folder")
    file.unlink(missing_ok=True)  # first, so that it never tells of rounds that are gone
    for path in rounds:
        shutil.rmtree(path)
    for name in ("metrics.csv", "curves.png"):
        (folder / name).unlink(missing_ok=True)


def remove_round(folder: Path) -> None:
    """Remove the folder of a round.

    Raises:
        FileExistsError: where it holds a query that ``active`` did not make.
    """
    own, above = folder / "pool.json", folder.parent / "pool.json"
    if own.is_file():
        whole = PoolRecord.load(above) if above.is_file() else PoolRecord(above)
        if any(row["by"] != "oracle" for row in missing_rows(PoolRecord.load(own), whole)):
            raise FileExistsError(f"{own} holds questions that were asked by hand: move {folder} elsewhere first")
    shutil.rmtree(folder, ignore_errors=True)


def _settle(trainer: L.Trainer, task: PoolTask, data: Any, file: Path, seed: int) -> PoolRecord:
    """The record as it stands, with every question answered and no end too early."""
    data.setup()
    data.oracle(np.empty(0, np.int64))  # or there is none
    if task.warm_start and trainer.checkpoint_callback is None:
        raise ValueError("warm_start=True needs the checkpoints of the rounds before: leave enable_checkpointing on")
    record = PoolRecord.load(file) if file.is_file() else PoolRecord(file)
    data.use(record)
    if _by_hand(record):
        raise ValueError(f"{file} holds questions to a person, which no oracle answers: name another --run folder")
    for row in record.results:
        if (row["strategy"], row["seed"]) != (task.strategy_name, seed + row["round"]):
            raise ValueError(
                f"{file} holds round {row['round']} of {row['strategy']} with seed {row['seed'] - row['round']}, got "
                f"{task.strategy_name} with seed {seed}: name another --run folder, or add --overwrite to lose it"
            )
    _answer(trainer, data, record)
    last = record.results[-1] if record.results else None
    if last is not None and last.get("final") and last["round"] < data.rounds and len(data.unlabelled_indices):
        record.results.pop()
    return record


def _train(trainer: L.Trainer, task: PoolTask, data: Any, record: PoolRecord, round_folder: Path, number: int) -> None:
    """One round: fit, test and, unless it is the last, choose. Nothing is saved but in the round's folder."""
    if trainer.is_global_zero:
        # the labels that this round is trained on, for a look back and for going on by hand
        PoolRecord(round_folder / "pool.json", record.settings, record.queries, record.results).save()
    _wait()
    before = round_folder.parent / f"round_{number - 1:02d}" / "checkpoints" / "last.ckpt"
    if task.warm_start and number:
        task.load_state_dict(torch.load(before, map_location="cpu", weights_only=True)["state_dict"], strict=False)
    began = time.monotonic()
    trainer.fit(task, datamodule=data)
    tested = trainer.test(task, datamodule=data, verbose=False)[0]
    data.use(record)
    final = number >= data.rounds or not len(data.unlabelled_indices)
    result = {**_result(task, data, number), **{k: float(v) for k, v in tested.items()}}
    if not final:
        query, predicted = choose(trainer, task, data)
        _note(record, data, query, predicted)
    record.results.append(
        {**result, "known_total": data.known_total, "seconds": round(time.monotonic() - began, 1), "final": final}
    )


def _answer(trainer: L.Trainer, data: Any, record: PoolRecord) -> None:
    """Let the oracle answer what is open."""
    pending = record.pending
    if pending:
        indices = np.array([row["index"] for row in pending])
        names = [*data.class_names, UNKNOWN]
        answers = data.oracle(indices)
        outside = answers[(answers < 0) | (answers > data.num_classes)]
        if len(outside):
            raise ValueError(f"the oracle must answer 0 to {data.num_classes}, got {outside[0]}")
        record.answer({int(i): names[a] for i, a in zip(indices, answers, strict=True)}, "oracle")
        if trainer.is_global_zero:
            record.save()
        data.use(record)


def _wait() -> None:
    """Until every process is here; before the first Trainer has started the others, there is nobody to wait for."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()


def _line(record: PoolRecord, number: int, rounds: int) -> str:
    row = curves(record)[number]
    text = f"round {number} of {rounds}: {row['labels']} labels bought, accuracy {row['test/acc']:.2%}"
    if "query/precision" in row:
        text += f"; query: precision {row['query/precision']:.2%}, recall {row['query/recall']:.2%}"
    return text
