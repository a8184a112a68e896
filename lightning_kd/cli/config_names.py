"""Shipped configs by name: ``distillation/dhkd_digits`` for ``configs/distillation/dhkd_digits.yaml``."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

__all__ = ["config_folder", "config_names", "config_path", "with_config_paths"]


def config_folder() -> Path:
    """Where the configs are: inside the installed package, or the repository's folder of an editable install."""
    package = Path(__file__).parent.parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def config_names() -> list[str]:
    """All shipped configs, such as ``distillation/dhkd_digits``."""
    folder = config_folder()
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def config_path(name: str) -> str:
    """The path of a config given by path or by shipped name.

    Raises:
        FileNotFoundError: with the nearest known names.
    """
    if Path(name).is_file():
        return name
    path = config_folder() / f"{name.removesuffix('.yaml')}.yaml"
    if path.is_file():
        return str(path)
    names = config_names()
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.3)
    hint = f"did you mean {', '.join(near)}? " if near else ""
    raise FileNotFoundError(
        f"--config {name!r} is neither a file nor a shipped config: {hint}`lightning-kd list` shows all {len(names)}"
    )


def with_config_paths(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments with every config name replaced by its path, and these paths in order."""
    out: list[str] = []
    paths: list[str] = []
    expects_value = False
    for arg in args:
        flag, equals, value = arg.partition("=")
        if expects_value:
            paths.append(config_path(arg))
            out.append(paths[-1])
            expects_value = False
        elif equals and flag in ("--config", "-c"):
            paths.append(config_path(value))
            out.append(f"{flag}={paths[-1]}")
        else:
            expects_value = arg in ("--config", "-c")
            out.append(arg)
    return out, paths
