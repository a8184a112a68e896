"""``config.yaml`` of a run, as it can be given to ``--config`` again, and whether two of them are one recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from lightning_kd.compare.runs import flat

__all__ = ["check_same_recipe", "config_text"]

# what may change while a benchmark goes on: more rounds, another machine, another look
_FREE = ("data.init_args.rounds", "run", "overwrite", "ckpt_path", "weights_only")
_FREE_OF_TRAINER = (
    *("accelerator", "devices", "num_nodes", "strategy", "logger", "callbacks", "profiler", "default_root_dir"),
    *("log_every_n_steps", "plugins", "benchmark", "deterministic", "check_val_every_n_epoch"),
)


def config_text(parser: Any, config: Any) -> str:
    """The text of the file."""
    config = config.clone()
    for key, value in (("ckpt_path", None), ("overwrite", False), ("run", None)):
        if key in config:
            config[key] = value
    return parser.dump(config, skip_none=False)


def check_same_recipe(text: str, path: Path) -> None:
    """Raise a ``ValueError`` where the rounds in the folder of ``path`` were made with other settings."""
    if not path.is_file():
        return
    old, new = (flat(yaml.safe_load(content)) for content in (path.read_text(), text))
    free = (*_FREE, *(f"trainer.{name}" for name in _FREE_OF_TRAINER), "trainer.enable_")
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key) and not key.startswith(free):
            raise ValueError(
                f"the rounds in {path.parent} were made with {key}={old.get(key)}, got {new.get(key)}: keep it, name "
                "another --run folder, or add --overwrite to lose them"
            )
