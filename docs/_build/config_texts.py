"""Shipped configs by name: what they are in full."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_kd.cli import composition
from lightning_kd.cli.config_names import config_path


def settings_of(name: str) -> dict[str, Any]:
    """The settings, those of its parts merged in."""
    return composition.composed_settings(config_path(name))


def yaml_of(name: str) -> str:
    """The text, as it can be copied into a file of one's own."""
    return composition.printed_config([name])


def first_line(name: str) -> str:
    """What its first line says."""
    return composition.first_line(Path(config_path(name)))


def is_complete(name: str) -> bool:
    """Whether it names a method and data; others are added to one that does."""
    return composition.can_run(settings_of(name))
