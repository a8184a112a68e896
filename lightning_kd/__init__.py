"""Research methods that train better classifiers, as PyTorch Lightning modules.

``from lightning_kd import DHKD, CIFAR100DataModule`` works for every method and data module; ``lightning_kd.load``
loads a trained run. They are imported at first use, so that light commands start fast.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(name)
    import importlib

    from lightning_kd.core.registry import family_packages

    places = [
        importlib.import_module(f"lightning_kd.{part}") for part in ("core", "data", "nets", "callbacks", "deploy")
    ]
    for place in [*places, *family_packages()]:
        if name in getattr(place, "__all__", ()):
            return getattr(place, name)
    raise AttributeError(f"module 'lightning_kd' has no attribute {name!r}")
