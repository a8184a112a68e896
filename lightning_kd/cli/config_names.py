"""Finding shipped configs by name: ``distillation/dhkd_digits`` is ``configs/distillation/dhkd_digits.yaml``."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

__all__ = ["config_folder", "config_names", "config_path", "near_configs", "with_config_paths"]


_CLASSES = ("--model", "--data", "--model.class_path", "--data.class_path")


def config_folder() -> Path:
    """The folder of the configs: in the installed package, or in the repository of an editable install."""
    package = Path(__file__).parent.parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def config_names() -> list[str]:
    """The names of all shipped configs, such as ``distillation/dhkd_digits``, without those of claims."""
    folder = config_folder()
    names = (path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))
    return sorted(name for name in names if not name.startswith("claims/"))


def config_path(name: str) -> str:
    """The path of a config, given by its path, by its shipped name, or by a run folder.

    Raises:
        FileNotFoundError: if there is none, with the nearest known names.
    """
    if Path(name).is_file():
        return name
    if (Path(name) / "config.yaml").is_file():
        return str(Path(name) / "config.yaml")
    path = config_folder() / f"{name.removesuffix('.yaml')}.yaml"
    if path.is_file():
        return str(path)
    near = near_configs(name)
    hint = f"did you mean {', '.join(near)}? " if near else ""
    raise FileNotFoundError(
        f"--config {name!r} is neither a file nor a shipped config: {hint}`lightning-kd list` shows all "
        f"{len(config_names())}"
    )


def near_configs(name: str) -> list[str]:
    """Up to three shipped configs whose names, with or without their folder, are like ``name``, the nearest first."""
    names = config_names()
    own = name.removesuffix(".yaml").lower()
    last = own.rpartition("/")[2]

    def likeness(known: str) -> float:
        pairs = (own, known), (last, known.rpartition("/")[2])
        return max(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)

    return [known for known in sorted(names, key=likeness, reverse=True)[:3] if likeness(known) >= 0.7]


def with_config_paths(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Replace config names by paths, and move configs to the front.

    Configs come first, so that an option always overrides them. A class (``--model DHKD``) that stands before a config
    is repeated before it, so that the config's settings apply to this class, and again after it, so that it overrides
    the config's class.

    Args:
        args: the words of the command line.

    Returns:
        ``(words, paths)``: the new words, and the paths of the configs in order.
    """
    words = list(args)
    verb = [words.pop(0)] if words and not words[0].startswith("-") else []
    configs: list[str] = []
    classes: list[str] = []
    flags: list[str] = []
    paths: list[str] = []
    while words:
        word = words.pop(0)
        flag, equals, value = word.partition("=")
        if flag in ("--config", "-c") and (equals or words):
            paths.append(config_path(value if equals else words.pop(0)))
            configs += [*classes, "--config", paths[-1]]
            classes = []
        else:
            flags.append(word)
            if flag in _CLASSES:
                classes += [word] if equals else [word, *words[:1]]
    return [*verb, *configs, *flags], paths
