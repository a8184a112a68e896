"""Loads a finished checkpoint into its task, for the verbs that change or measure it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L

from lightning_kd.core.checkpoint_files import read_checkpoint
from lightning_kd.core.run_folder import RunFolder
from lightning_kd.core.task import Task

__all__ = ["checkpoint_path", "load_checkpoint", "sample_source"]


def checkpoint_path(trainer: L.Trainer, ckpt_path: str | Path | None) -> Path:
    """The file that ``last`` (also meant by ``None``), ``best`` or a path stands for in the Trainer's run folder.

    Raises:
        FileNotFoundError: where the run has no such checkpoint yet.
    """
    name = str(ckpt_path or "last")
    return RunFolder(trainer.default_root_dir).checkpoint(name) if name in ("last", "best") else Path(name)


def load_checkpoint(trainer: L.Trainer, task: Task, data: Any, path: Path) -> dict[str, Any]:
    """Set up the data, load the weights and move the task to its device; returns the checkpoint.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: with several processes, or where the file is damaged, or no checkpoint.
    """
    if trainer.world_size > 1:
        raise ValueError(
            f"a checkpoint is shifted and measured by one process, got {trainer.world_size}: add --trainer.devices 1"
        )
    checkpoint = read_checkpoint(path)
    data.trainer = trainer  # its device, and the labels of the run
    data.prepare_data()
    data.setup(None if hasattr(data, "train_target") else "fit")
    kept = set(checkpoint["state_dict"])
    task.on_load_checkpoint(checkpoint)  # first, as Lightning does: it may put in what the file leaves out
    task.load_state_dict(checkpoint["state_dict"], strict=task.strict_loading)
    checkpoint["state_dict"] = {key: value for key, value in checkpoint["state_dict"].items() if key in kept}
    task.to(trainer.strategy.root_device)
    return checkpoint


def sample_source(data: Any) -> Any:
    """What training samples are drawn from: the data module, or the loader of one that is not ours."""
    return data if hasattr(data, "train_target") else data.train_dataloader()
