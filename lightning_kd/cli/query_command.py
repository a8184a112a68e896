"""``lightning-kd query``: choose the samples of a pool to label next."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import lightning as L

from lightning_kd.active_learning.queries import write_query
from lightning_kd.cli.load_checkpoint import checkpoint_path
from lightning_kd.cli.pool_verbs import alone_on_pool, check_kept, check_pool

__all__ = ["check", "next_step", "query"]


def query(
    trainer: L.Trainer,
    model: Any,
    datamodule: Any,
    ckpt_path: str | None = None,
    weights_only: bool | None = None,
) -> Path:
    """Choose the samples of a pool to label next, and write them to query_ROUND.csv.

    The weights are those of last.ckpt by default.

    Returns:
        The path of that file.

    Raises:
        ValueError: unless this is a method for pools on a pool, and if an earlier query has no answers yet.
    """
    data = check_pool("query", model, datamodule)
    folder = Path(trainer.default_root_dir)
    with alone_on_pool(folder):
        return write_query(trainer, model, data, folder, str(checkpoint_path(trainer, ckpt_path)))


def check(config: Any) -> None:
    """Raise for settings that ``query`` cannot work with, before anything is built."""
    check_kept("query", config)


def next_step(config: str, path: Path) -> str:
    """The next command, for the person who labels."""
    file = shlex.quote(str(path))
    page = path.with_suffix(".html")
    opened = f"open {shlex.quote(str(page))} in a browser, or " if page.is_file() else ""
    return f"{opened}fill in the column label of {file}, then lightning-kd label {file}"
