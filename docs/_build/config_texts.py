"""Shipped configs by name: what they are in full."""

from __future__ import annotations

from typing import Any

import yaml

from lightning_kd.cli.config_names import config_path


def settings_of(name: str) -> dict[str, Any]:
    """The settings."""
    return yaml.safe_load(yaml_of(name))


def yaml_of(name: str) -> str:
    """The text, as it can be copied into a file of one's own."""
    with open(config_path(name), encoding="utf-8") as file:
        return file.read()


def first_line(name: str) -> str:
    """What its first line says."""
    return yaml_of(name).partition("\n")[0].removeprefix("#").strip()


def is_complete(name: str) -> bool:
    """Whether it names a method and data; others are added to one that does."""
    settings = settings_of(name)
    return all("class_path" in settings.get(key, {}) for key in ("model", "data"))
