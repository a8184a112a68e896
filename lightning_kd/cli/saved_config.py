"""``config.yaml`` of a run, as it can be given to ``--config`` again, and whether two of them are one recipe."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from lightning_kd.compare.runs import flat

__all__ = ["check_same_recipe", "check_same_run", "config_text"]

_OF_ONE_COMMAND = ("ckpt_path", "overwrite", "run", "weights_only")

# what may change while a benchmark goes on: more rounds, another machine, another look
_FREE_OF_TRAINER = (
    *("accelerator", "devices", "num_nodes", "strategy", "logger", "callbacks", "profiler", "default_root_dir"),
    *("log_every_n_steps", "plugins", "benchmark", "deterministic", "check_val_every_n_epoch", "enable_"),
)
_FREE = ("data.init_args.rounds", *_OF_ONE_COMMAND, *(f"trainer.{name}" for name in _FREE_OF_TRAINER))
# what a fit may change besides
_FREE_OF_TRAINER_OF_A_FIT = (
    *("max_epochs", "max_steps", "min_epochs", "min_steps", "max_time", "limit_val", "limit_test", "limit_predict"),
    *("val_check_interval", "num_sanity_val_steps", "detect_anomaly", "barebones", "inference_mode", "model_registry"),
)
_DATA_OF_A_FIT = ("num_workers", "pin_memory", "eval_batch_size", "root", "path", "target_path", "predict", "device")
_FREE_OF_A_FIT = (
    *(f"trainer.{name}" for name in _FREE_OF_TRAINER_OF_A_FIT),
    *(f"data.init_args.{source}{name}" for name in _DATA_OF_A_FIT for source in ("", "source.init_args.")),
    *("model.init_args.compile", "model.init_args.channels_last"),
)
# of the schedulers of torch that end with the training
_LENGTHS = ("T_max", "total_steps", "epochs", "steps_per_epoch")


def config_text(parser: Any, config: Any) -> str:
    """The text of the file, without what belongs to one command: given again, it would undo flags."""
    lines = parser.dump(config, skip_none=False).splitlines(keepends=True)
    return "".join(line for line in lines if line.partition(":")[0] not in _OF_ONE_COMMAND)


def check_same_recipe(text: str, path: Path) -> None:
    """Raise a ``ValueError`` where the rounds in the folder of ``path`` were made with other settings."""
    for key, old, new in _changes(text, path):
        if not key.startswith(_FREE):
            raise ValueError(
                f"the rounds in {path.parent} were made with {key}={old}, got {new}: keep it, name another --run "
                "folder, or add --overwrite to lose them"
            )


def check_same_run(text: str, checkpoint: str | Path) -> None:
    """Raise a ``ValueError`` where a fit would go on from a checkpoint with other settings than those of its run.

    What makes no other training may change: the machine, the loggers and callbacks, how validation is batched, and the
    number of epochs, unless a schedule of torch's has a length of its own. A file may be elsewhere where the old path
    leads nowhere. Settings that only one of the two has, as another version may, are not looked at. A checkpoint
    without a ``config.yaml`` above its folder is not, either.
    """
    path = Path(checkpoint).absolute().parent.parent / "config.yaml"
    changes = list(_changes(text, path))
    epochs = [(old, new) for key, old, new in changes if key in ("trainer.max_epochs", "trainer.max_steps")]
    for key, old, new in changes:
        if key.startswith((*_FREE, *_FREE_OF_A_FIT)):
            continue
        raise ValueError(
            f"the run in {path.parent} was made with {key}={old}, got {new}: keep it, or train anew in another --run "
            "folder, from the weights of the old one where the method takes weights"
        )
    for key, value in flat(yaml.safe_load(text)).items() if epochs else ():
        if "lr_scheduler" in key and key.rpartition(".")[2] in _LENGTHS and value is not None:
            raise ValueError(
                f"the schedule of the run in {path.parent} has a length of its own ({key}={value}), got max_epochs="
                f"{epochs[0][1]} after {epochs[0][0]}: keep that, or take lightning_kd.core.schedules.CosineAnnealing "
                "in a run of its own, which is as long as the training"
            )


def _changes(text: str, path: Path) -> Iterator[tuple[str, Any, Any]]:
    """The settings that both have, and differ in: key, the value in the file ``path``, and the one in ``text``."""
    if not path.is_file():
        return
    try:
        old = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(old, dict):
            raise ValueError("it holds no settings")
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is damaged ({reason}): put back a copy, or name another --run folder") from None
    yield from _differing("", old, yaml.safe_load(text))


def _differing(key: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in [name for name in old if name in new]:
            yield from _differing(f"{key}.{name}" if key else str(name), old[name], new[name])
    elif old != new and not _moved(old, new):
        yield key, _short(old), _short(new)


def _moved(old: Any, new: Any) -> bool:
    """Whether these are paths, of which the old one leads nowhere any more."""
    return isinstance(old, str) and isinstance(new, str) and not Path(old).exists() and Path(new).exists()


def _short(value: Any) -> Any:
    return value.get("class_path", value) if isinstance(value, dict) else value
