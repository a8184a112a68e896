"""The benchmark of ``lightning-kd active``: rounds of training, querying, and labels from an oracle."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np

from lightning_kd.active_learning.pool_task import PoolTask
from lightning_kd.active_learning.queries import add_query, select_query, start_result, wait_for_all
from lightning_kd.active_learning.round_folders import asked_by_hand, remove_round
from lightning_kd.core.checkpoint_files import read_checkpoint
from lightning_kd.core.distributed import is_first_process
from lightning_kd.pool import UNKNOWN, PoolRecord
from lightning_kd.pool.label_curves import curves, draw_curves, write_metrics

__all__ = ["run_rounds"]

Objects = tuple[L.Trainer, PoolTask, Any]


def run_rounds(
    start: Callable[[int, Path], Objects],
    folder: str | Path,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Run the whole benchmark: train, test, query and label by the oracle, round by round; then train and test again.

    Each round has a folder of its own, ``FOLDER/round_00`` and so on, and a new Trainer, task and data module.
    ``FOLDER/pool.json`` records all finished rounds. A run that was interrupted and is started again keeps these,
    trains the unfinished round again from its seed, and ends with the same results as an uninterrupted run.
    ``FOLDER/metrics.csv`` has one row for each round, ``FOLDER/curves.png`` shows the curves.

    Args:
        start: makes a new ``(trainer, task, data)`` from the number and the folder of a round; called after
            ``seed_everything(seed + round)``.
        folder: the folder of the whole run.
        seed: seed of the first round.
        say: called with a line of progress after each round, on process 0.

    Returns:
        One entry for each round, see ``pool.label_curves.curves``.

    Raises:
        ValueError: if the folder holds rounds of another strategy or seed, or queries to a person; if the oracle gives
            a label out of range.
    """
    folder = Path(folder)
    file = folder / "pool.json"
    record = PoolRecord.load(file) if file.is_file() else PoolRecord(file)
    done = len(record.results)
    number = max(done - 1, 0)  # the last recorded one may lack its answers, or may be last no longer (more rounds)
    while True:
        _make_round(start, record, number, number >= done, seed, say)
        gc.collect()  # Trainer, task and data refer to one another, which would keep all samples in memory
        if len(record.results) <= number:  # it was the last of fewer rounds: train it again, with a query
            done = number
            continue
        wait_for_all()
        if record.results[number].get("final"):
            break
        number += 1
    rows = curves(record)
    if is_first_process():
        write_metrics(record, folder / "metrics.csv")
        draw_curves(rows, folder / "curves.png", record.results[-1]["strategy"])
    return rows


def _make_round(
    start: Callable[[int, Path], Objects],
    record: PoolRecord,
    number: int,
    new: bool,
    seed: int,
    say: Callable[[str], None],
) -> None:
    """Run round ``number``, or check and complete a recorded one; ``record`` then holds the round and its answers.

    With ``new`` the round is trained. Without, it is expected in ``record``; if it turns out to have been the last of
    fewer rounds, it is removed from ``record`` instead, for the caller to call again with ``new``.
    """
    folder = record.path.parent
    round_folder = folder / f"round_{number:02d}"
    if new and is_first_process():
        remove_round(round_folder, record)  # the files of an interrupted attempt
    L.seed_everything(seed + number, workers=True, verbose=False)
    trainer, task, data = start(number, round_folder)
    _resume_record(trainer, task, data, record, seed)
    if new and len(record.results) <= number:
        _train_round(trainer, task, data, record, round_folder, number)
        if trainer.is_global_zero:
            record.save()  # now the round counts as finished
        _ask_oracle(trainer, data, record)
        if trainer.is_global_zero:
            write_metrics(record, folder / "metrics.csv")
            say(_describe_round(record, number, data.rounds))


def _resume_record(trainer: L.Trainer, task: PoolTask, data: Any, record: PoolRecord, seed: int) -> None:
    """Check ``record`` against the task and the data, let the oracle answer open queries, and give it to ``data``.

    A final round is removed from the record if ``data.rounds`` now asks for more rounds.
    """
    data.setup()
    data.oracle(np.empty(0, np.int64))  # raises if the data module has no oracle
    if task.single_query and data.rounds > 1:
        raise ValueError(
            f"{task.strategy_name} makes one query, with the whole budget, got data.rounds={data.rounds}: set it to 1"
        )
    if task.warm_start and trainer.checkpoint_callback is None:
        raise ValueError("warm_start=True needs the checkpoints of earlier rounds: leave enable_checkpointing on")
    data.set_record(record)
    if asked_by_hand(record):
        raise ValueError(f"{record.path} holds queries to a person, which no oracle answers: name another --run folder")
    for row in record.results:
        if (row["strategy"], row["seed"]) != (task.strategy_name, seed + row["round"]):
            raise ValueError(
                f"{record.path} holds round {row['round']} of {row['strategy']} with seed {row['seed'] - row['round']},"
                f" got {task.strategy_name} with seed {seed}: name another --run folder, or replace it by --overwrite"
            )
    _ask_oracle(trainer, data, record)
    last = record.results[-1] if record.results else None
    if last is not None and last.get("final") and last["round"] < data.rounds and len(data.unlabelled_indices):
        record.results.pop()


def _train_round(
    trainer: L.Trainer, task: PoolTask, data: Any, record: PoolRecord, round_folder: Path, number: int
) -> None:
    """Fit, test and, unless the round is the last, query. Files are written in the folder of the round only."""
    if trainer.is_global_zero:
        # the labels that this round is trained on, so that its folder is a run folder by itself
        PoolRecord(round_folder / "pool.json", record.settings, record.queries, record.results).save()
    wait_for_all()
    before = round_folder.parent / f"round_{number - 1:02d}" / "checkpoints" / "last.ckpt"
    if task.warm_start and number:
        task.load_state_dict(read_checkpoint(before)["state_dict"], strict=False)
    final = number >= data.rounds or not len(data.unlabelled_indices)
    task.query_follows = not final
    began = time.monotonic()
    trainer.fit(task, datamodule=data)
    tested = trainer.test(task, datamodule=data, verbose=False)[0]
    data.set_record(record)
    result = {**start_result(task, data, number), **{k: float(v) for k, v in tested.items()}}
    if not final:
        query, predicted = select_query(trainer, task, data)
        add_query(record, data, query, predicted)
    record.results.append(
        {**result, "known_total": data.known_total, "seconds": round(time.monotonic() - began, 1), "final": final}
    )


def _ask_oracle(trainer: L.Trainer, data: Any, record: PoolRecord) -> None:
    """Let the oracle give the labels of all samples that have no answer."""
    pending = record.pending
    if pending:
        indices = np.array([row["index"] for row in pending])
        names = [*data.class_names, UNKNOWN]
        answers = data.oracle(indices)
        outside = answers[(answers < 0) | (answers > data.num_classes)]
        if len(outside):
            raise ValueError(f"the oracle must answer 0 to {data.num_classes}, got {outside[0]}")
        record.add_answers({int(i): names[a] for i, a in zip(indices, answers, strict=True)}, "oracle")
        if trainer.is_global_zero:
            record.save()
        data.set_record(record)


def _describe_round(record: PoolRecord, number: int, rounds: int) -> str:
    row = curves(record)[number]
    text = f"round {number} of {rounds}: {row['labels']} labels bought, accuracy {row['test/acc']:.2%}"
    if "query/precision" in row:
        text += f"; query: precision {row['query/precision']:.2%}, recall {row['query/recall']:.2%}"
    return text
