"""The benchmark of a pool: rounds of training, asking and answering by an oracle."""

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
        One entry a round, see ``pool.label_curves.curves``.

    Raises:
        ValueError: where the folder holds rounds of another strategy or seed, or what a person did by hand.
    """
    folder = Path(folder)
    file = folder / "pool.json"
    record = PoolRecord.load(file) if file.is_file() else PoolRecord(file)
    done = len(record.results)
    number = max(done - 1, 0)  # the last one may have to ask its oracle still, or be the last no more
    while True:
        _make_round(start, record, number, number >= done, seed, say)
        gc.collect()  # Trainer, task and data know one another, and would stay with all samples
        if len(record.results) <= number:  # it was the end of a shorter run: make it anew
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
    """Make a round, unless it is done, and bring ``record`` to where it is after it. Where the round has to be made
    ``new`` and is not asked for as such, nothing is made, and the record ends before it."""
    folder = record.path.parent
    round_folder = folder / f"round_{number:02d}"
    if new and is_first_process():
        remove_round(round_folder, record)  # what a broken one left
    L.seed_everything(seed + number, workers=True, verbose=False)
    trainer, task, data = start(number, round_folder)
    _resume_record(trainer, task, data, record, seed)
    if new and len(record.results) <= number:
        _train_round(trainer, task, data, record, round_folder, number)
        if trainer.is_global_zero:
            record.save()  # from here on the round is done
        _ask_oracle(trainer, data, record)
        if trainer.is_global_zero:
            write_metrics(record, folder / "metrics.csv")
            say(_describe_round(record, number, data.rounds))


def _resume_record(trainer: L.Trainer, task: PoolTask, data: Any, record: PoolRecord, seed: int) -> None:
    """Let ``data`` use the record, with every question answered and no end too early."""
    data.setup()
    data.oracle(np.empty(0, np.int64))  # or there is none
    if task.asks_once and data.rounds > 1:
        raise ValueError(
            f"{task.strategy_name} asks once, with all of the budget, got data.rounds={data.rounds}: set it to 1"
        )
    if task.warm_start and trainer.checkpoint_callback is None:
        raise ValueError("warm_start=True needs the checkpoints of the rounds before: leave enable_checkpointing on")
    data.set_record(record)
    if asked_by_hand(record):
        raise ValueError(
            f"{record.path} holds questions to a person, which no oracle answers: name another --run folder"
        )
    for row in record.results:
        if (row["strategy"], row["seed"]) != (task.strategy_name, seed + row["round"]):
            raise ValueError(
                f"{record.path} holds round {row['round']} of {row['strategy']} with seed {row['seed'] - row['round']},"
                f" got {task.strategy_name} with seed {seed}: name another --run folder, or add --overwrite to lose it"
            )
    _ask_oracle(trainer, data, record)
    last = record.results[-1] if record.results else None
    if last is not None and last.get("final") and last["round"] < data.rounds and len(data.unlabelled_indices):
        record.results.pop()


def _train_round(
    trainer: L.Trainer, task: PoolTask, data: Any, record: PoolRecord, round_folder: Path, number: int
) -> None:
    """One round: fit, test and, unless it is the last, choose. Nothing is saved but in the round's folder."""
    if trainer.is_global_zero:
        # the labels that this round is trained on, for a look back and for going on by hand
        PoolRecord(round_folder / "pool.json", record.settings, record.queries, record.results).save()
    wait_for_all()
    before = round_folder.parent / f"round_{number - 1:02d}" / "checkpoints" / "last.ckpt"
    if task.warm_start and number:
        task.load_state_dict(read_checkpoint(before)["state_dict"], strict=False)
    final = number >= data.rounds or not len(data.unlabelled_indices)
    task.choice_follows = not final
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
    """Let the oracle answer what is open."""
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
