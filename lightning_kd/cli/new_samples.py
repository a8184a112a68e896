"""What ``predict`` of new samples has from the run, so that the data trained on need not be there any more."""

from __future__ import annotations

from typing import Any

from lightning_kd.core.checkpoint_files import read_checkpoint

__all__ = ["take_from_run"]


def take_from_run(config: Any) -> None:
    """Put class names, mean, std and kind of problem from the checkpoint into the arguments of the data module.

    Only those that have no value there; none without ``data.predict`` or without a checkpoint.

    Args:
        config: the settings of ``predict``.
    """
    arguments = config.get("data", {}).get("init_args") or {}
    if arguments.get("predict") is None or not config.get("ckpt_path"):
        return
    checkpoint = read_checkpoint(config["ckpt_path"])
    known = checkpoint.get("data_description") or {"class_names": checkpoint.get("class_names")}
    for name in ("class_names", "mean", "std", "kind"):
        if name in arguments and arguments[name] is None:
            arguments[name] = known.get(name)
