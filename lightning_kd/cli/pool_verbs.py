"""Checks that the verbs for a pool (``query`` and ``active``) make before they start."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from lightning_kd.active_learning.pool_task import PoolTask
from lightning_kd.core.distributed import is_first_process
from lightning_kd.data import OpenSetDataModule
from lightning_kd.pool import PoolRecord
from lightning_kd.pool.pool_record import alone, pool_file

__all__ = ["add_new_classes", "alone_on_pool", "check_kept", "check_pool"]


def check_kept(verb: str, config: Any) -> None:
    """Raise a ``ValueError`` for ``fast_dev_run``, with which results would not be written."""
    if config.trainer.get("fast_dev_run"):
        raise ValueError(
            f"{verb} must write its results, got fast_dev_run={config.trainer.fast_dev_run}: try --trainer."
            "max_epochs 1 with another --run folder instead"
        )


def check_pool(verb: str, model: Any, datamodule: Any) -> Any:
    """Check that the model is a ``PoolTask`` and the data a pool; set up and return the data module.

    Raises:
        ValueError: if they are not, or the data has ``answers`` of another run.
    """
    if not isinstance(model, PoolTask) or not isinstance(datamodule, OpenSetDataModule):
        raise ValueError(
            f"{verb} needs a method for pools on an OpenSetDataModule, got {type(model).__name__} "
            f"on {type(datamodule).__name__}: see the configs active_learning/... of lightning-kd list"
        )
    if datamodule.answers is not None:
        raise ValueError(f"{verb} uses the answers of its own run, got answers={datamodule.answers!r}: leave it out")
    datamodule.setup()
    return datamodule


def add_new_classes(config: Any, file: Path) -> None:
    """Add the classes that ``pool.json`` records as new to ``new_classes`` of the data, in place.

    Raises:
        ValueError: if the file is damaged.
    """
    arguments = config.data.get("init_args") if config.get("data") else None
    if arguments is not None and arguments.get("answers"):
        file = pool_file(arguments["answers"])
    if arguments is None or "new_classes" not in arguments or not file.is_file():
        return
    given = arguments["new_classes"] or []
    added = [name for name in PoolRecord.load(file).settings.get("new_classes", []) if name not in given]
    arguments["new_classes"] = [*given, *added] or None


def alone_on_pool(folder: Path) -> AbstractContextManager[None]:
    """A lock on the pool of the run folder against other commands; process 0 holds it for all processes."""
    return alone(folder) if is_first_process() else nullcontext()
