"""``lightning-kd active``: a whole active learning benchmark, with a new Trainer, task and data module each round."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import lightning as L

from lightning_kd.active_learning.pool_task import PoolTask
from lightning_kd.active_learning.round_folders import files_of_rounds
from lightning_kd.active_learning.rounds import run_rounds
from lightning_kd.cli.pool_verbs import alone_on_pool, check_kept, check_pool
from lightning_kd.cli.saved_config import check_same_recipe
from lightning_kd.core.checkpoint_files import read_checkpoint
from lightning_kd.core.run_folder import RunFolder, remove_files
from lightning_kd.pool import PoolRecord
from lightning_kd.pool.label_curves import table

__all__ = ["active", "check", "next_step", "run_active"]


def active(
    trainer: L.Trainer,
    model: Any,
    datamodule: Any,
    ckpt_path: str | None = None,
    weights_only: bool | None = None,
) -> None:
    """Run a whole active learning benchmark: train, test, query and label by the oracle, round by round.

    Raises:
        RuntimeError: always. Each round needs a new Trainer; the command line calls ``run_active`` instead.
    """
    raise RuntimeError(
        "active needs a new Trainer, model and data module for each round: from Python call "
        "lightning_kd.active_learning.run_rounds(start, folder)"
    )


def check(config: Any) -> None:
    """Raise for settings that ``active`` cannot work with, before anything is built."""
    check_kept("active", config)
    if config.get("ckpt_path"):
        raise ValueError(f"active resumes by itself, got ckpt_path={config['ckpt_path']}: leave it out")
    if type(config.get("seed_everything")) is not int:
        raise ValueError(f"active needs a seed, got seed_everything={config.get('seed_everything')}: give a number")
    folder = RunFolder(config["run"])
    if folder.last.is_file():
        raise FileExistsError(f"{folder.path} holds a single fit: name another --run folder for active")


def run_active(cli: Any) -> None:
    """Run all rounds of the ``RunCLI``, and print a table of them at the end.

    Raises:
        ValueError: if the data have no oracle, or the folder holds rounds with other settings.
    """
    check_pool("active", cli.model, cli.datamodule).oracle([])  # raises if there is no oracle
    whole, config = cli.run_folder, cli.config["active"]
    with alone_on_pool(whole.path):
        rows = _run_rounds(cli, whole, config)
    if cli.is_first:
        print(f"\n{table(rows)}")


def _run_rounds(cli: Any, whole: RunFolder, config: Any) -> list[dict[str, Any]]:
    seed = config["seed_everything"]
    if cli.is_first:
        text = cli.saved_config()
        if config["overwrite"]:
            files = files_of_rounds(whole.path)
            cli.beginning.before.set_aside(files)
            remove_files(whole.path, files)
        if whole.pool.is_file():
            check_same_recipe(text, whole.path / "config.yaml")
            cli.datamodule.set_record(PoolRecord.load(whole.pool))
        cli.beginning.add(whole, "active", seed, text)

    def enter(folder: RunFolder, seed: int, outcome: str) -> None:
        if cli.run_folder is not whole and cli.run_folder.record:
            cli.run_folder.end(outcome, epochs=cli.trainer.fit_loop.epoch_progress.current.processed)
        cli.run_folder = folder
        config["seed_everything"], config["run"] = seed, str(folder.path)

    def start(number: int, path: Path) -> tuple[L.Trainer, PoolTask, Any]:
        folder = RunFolder(path)
        enter(folder, seed + number, "finished")
        if cli.is_first:
            cli.beginning.add(folder, "fit", seed + number, cli.saved_config())
        cli.instantiate_classes()
        cli.later_round = True
        return cli.trainer, cli.model, cli.datamodule

    outcome = "failed"
    try:
        rows = run_rounds(start, whole.path, seed)
        outcome = "finished"
    finally:
        enter(whole, seed, outcome)
    if cli.is_first:
        _end_rounds(whole.path, len(rows))
    return rows


def _end_rounds(folder: Path, count: int) -> None:
    """Mark finished rounds as finished whose ``run.json`` says otherwise because their command was killed."""
    for number in range(count):
        round_folder = RunFolder(folder / f"round_{number:02d}")
        record = round_folder.read_record()
        if record is not None and record["outcome"] != "finished":
            round_folder.record = record
            saved = round_folder.last.is_file()
            round_folder.end("finished", epochs=read_checkpoint(round_folder.last)["epoch"] + 1 if saved else None)


def next_step(config: str, answer: Any) -> str:
    """The next command for a run with this ``config.yaml``."""
    return f"lightning-kd compare {shlex.quote(str(Path(shlex.split(config)[0]).parent))}"
