"""The ``config.yaml`` of a run, and checking whether another command has the same settings."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from lightning_kd.compare.runs import flat

__all__ = ["check_same_recipe", "check_same_run", "config_text"]

_OF_ONE_COMMAND = ("ckpt_path", "overwrite", "run", "weights_only")

# settings that may change when active is resumed: more rounds, another machine, other displays
_FREE_OF_TRAINER = (
    *("accelerator", "devices", "num_nodes", "strategy", "logger", "callbacks", "profiler", "default_root_dir"),
    *(
        "log_every_n_steps",
        "sync_batchnorm",
        "plugins",
        "benchmark",
        "deterministic",
        "check_val_every_n_epoch",
        "enable_",
    ),
)
_FREE = ("data.init_args.rounds", *_OF_ONE_COMMAND, *(f"trainer.{name}" for name in _FREE_OF_TRAINER))
# settings that may also change when a fit is resumed
_FREE_OF_TRAINER_OF_A_FIT = (
    *("max_epochs", "max_steps", "min_epochs", "min_steps", "max_time", "limit_val", "limit_test", "limit_predict"),
    *("val_check_interval", "num_sanity_val_steps", "detect_anomaly", "barebones", "inference_mode", "model_registry"),
)
_DATA_OF_A_FIT = ("eval_batch_size", "predict", "device", "new_classes")
_FREE_OF_A_FIT = (
    *(f"trainer.{name}" for name in _FREE_OF_TRAINER_OF_A_FIT),
    *(f"data.init_args.{source}{name}" for name in _DATA_OF_A_FIT for source in ("", "source.init_args.")),
    *("model.init_args.compile", "model.init_args.channels_last"),
)
# values that mean the default
_SAME = {
    **{("trainer.precision", word): None for word in ("32", "32-true")},
    **{("trainer.gradient_clip_val", word): None for word in ("0", "0.0")},
}
# arguments of torch's schedulers with the length of the training
_LENGTHS = ("T_max", "total_steps", "epochs", "steps_per_epoch")


def config_text(parser: Any, config: Any) -> str:
    """The text of ``config.yaml``, without settings of a single command, such as ``ckpt_path`` and ``run``."""
    kept, dropping = [], False
    for line in parser.dump(config, skip_none=False).splitlines(keepends=True):
        if not line.startswith((" ", "\n")):  # a new key, not the continuation of a value
            dropping = line.partition(":")[0] in _OF_ONE_COMMAND
        if not dropping:
            kept.append(line)
    return "".join(kept)


def check_same_recipe(text: str, path: Path) -> None:
    """Raise a ``ValueError`` if the rounds in the folder of ``path`` were made with other settings than ``text``."""
    for key, old, new in _changes(text, path):
        if not key.startswith(_FREE):
            raise ValueError(
                f"the rounds in {path.parent} were made with {key}={old}, got {new}: keep it, name another --run "
                "folder, or replace them by --overwrite"
            )


def check_same_run(text: str, checkpoint: str | Path) -> None:
    """Raise a ``ValueError`` if a fit resumes a checkpoint with other settings than those of its run.

    Settings that do not change the training may differ: the machine, loggers and callbacks, the batch size of
    validation, and the number of epochs, unless a scheduler of torch has a fixed length. A path may differ if the old
    one does not exist. Settings that only one of the two configs has, as of different versions, are not compared, and
    neither is a checkpoint whose run has no ``config.yaml``.

    Args:
        text: the new config.
        checkpoint: the checkpoint, in a folder of the run folder.
    """
    path = Path(checkpoint).absolute().parent.parent / "config.yaml"
    changes = list(_changes(text, path))
    for key, old, new in changes:
        if key.startswith((*_FREE, *_FREE_OF_A_FIT)) or _is_free(key):
            continue
        raise ValueError(
            f"the run in {path.parent} was made with {key}={old}, got {new}: keep it, or train anew in another --run "
            "folder, from the weights of the old one where the method takes weights"
        )
    settings = flat(yaml.safe_load(text))
    unit = "max_steps" if settings.get("model.init_args.lr_interval") == "step" else "max_epochs"
    for old, new in [(old, new) for key, old, new in changes if key == f"trainer.{unit}"]:
        for key, value in settings.items():
            if "lr_scheduler" in key and key.rpartition(".")[2] in _LENGTHS and value not in (None, new):
                raise ValueError(
                    f"the schedule of the run in {path.parent} has a length of its own ({key}={value}), got {unit}="
                    f"{new} after {old}: keep that, or take lightning_kd.core.schedules.CosineAnnealing in a run of "
                    "its own, which is as long as the training"
                )


def _is_free(key: str) -> bool:
    """Whether a setting is of the optimizer's implementation, or of where and how data are read.

    Data themselves are compared by a digest.
    """
    name = key.rpartition(".")[2]
    if key.startswith("data."):
        return re.search("dir$|root$|path$|workers|pin_memory|persistent|prefetch", name) is not None
    return ".optimizer." in key and name in ("foreach", "fused", "capturable")


def _changes(text: str, path: Path) -> Iterator[tuple[str, Any, Any]]:
    """``(key, old, new)`` of the settings that the file ``path`` (old) and ``text`` (new) have with other values."""
    if not path.is_file():
        return
    try:
        old = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(old, dict):
            raise ValueError("it holds no settings")
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split()).replace('in "<unicode string>", ', "in ")
        raise ValueError(f"{path} is damaged ({reason}): put back a copy, or name another --run folder") from None
    yield from _differing("", old, yaml.safe_load(text))


def _differing(key: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in [name for name in old if name in new]:
            yield from _differing(f"{key}.{name}" if key else str(name), old[name], new[name])
    elif old != new and _SAME.get((key, str(old)), old) != _SAME.get((key, str(new)), new) and not _moved(old, new):
        yield key, _short(old), _short(new)


def _moved(old: Any, new: Any) -> bool:
    """Whether these are two paths of one file, or the old path does not exist any more."""
    if not isinstance(old, str) or not isinstance(new, str) or not Path(new).exists():
        return False
    return not Path(old).exists() or Path(old).samefile(new)


def _short(value: Any) -> Any:
    return value.get("class_path", value) if isinstance(value, dict) else value
