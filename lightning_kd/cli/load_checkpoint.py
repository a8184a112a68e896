"""Loading a finished checkpoint into its task, for the verbs ``shift``, ``sharpness`` and ``query``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L

from lightning_kd.core.checkpoint_files import read_checkpoint
from lightning_kd.core.run_folder import RunFolder
from lightning_kd.core.task import Task

__all__ = ["checkpoint_path", "load_checkpoint", "sample_source"]


def checkpoint_path(trainer: L.Trainer, ckpt_path: str | Path | None) -> Path:
    """The path of the checkpoint ``"last"`` (the default, ``None``) or ``"best"`` of the Trainer's run folder, or a
    path itself.

    Raises:
        FileNotFoundError: if the run has no such checkpoint.
    """
    name = str(ckpt_path or "last")
    return RunFolder(trainer.default_root_dir).checkpoint(name) if name in ("last", "best") else Path(name)


def load_checkpoint(trainer: L.Trainer, task: Task, data: Any, path: Path) -> dict[str, Any]:
    """Set up the data, load the weights and move the task to its device.

    Returns:
        The content of the checkpoint.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: with several processes, or if the file is damaged or no checkpoint.
    """
    if trainer.world_size > 1:
        raise ValueError(
            f"a checkpoint is shifted and measured by one process, got {trainer.world_size}: add --trainer.devices 1"
        )
    checkpoint = read_checkpoint(path)
    data.trainer = trainer  # gives it the device, and the labels of the run
    data.prepare_data()
    data.setup(None if hasattr(data, "train_target") else "fit")
    kept = set(checkpoint["state_dict"])
    task.on_load_checkpoint(checkpoint)  # first, as in Lightning: it may add entries to the state_dict
    task.load_state_dict(checkpoint["state_dict"], strict=task.strict_loading)
    checkpoint["state_dict"] = {key: value for key, value in checkpoint["state_dict"].items() if key in kept}
    task.to(trainer.strategy.root_device)
    return checkpoint


def sample_source(data: Any) -> Any:
    """The source of training samples: a data module of lightning_kd, or the training loader of any other."""
    return data if hasattr(data, "train_target") else data.train_dataloader()
