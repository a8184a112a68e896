"""Finding methods and data modules in the package, so that a new file is all that a new method needs."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from types import ModuleType
from typing import Any

FAMILIES = ("distillation", "active_learning", "noisy_labels", "flatness", "multi_label", "weak_labels")


def export_modules(package: str, namespace: dict[str, Any]) -> list[str]:
    """Import every module of ``package`` and put what their ``__all__`` names into ``namespace``; returns the names.

    Called from a package's ``__init__`` as ``__all__ = export_modules(__name__, globals())``.
    """
    names: set[str] = set()  # a module may hand on what another has
    for info in pkgutil.iter_modules(namespace["__path__"]):
        if not info.name.startswith("_"):
            module = importlib.import_module(f"{package}.{info.name}")
            for name in getattr(module, "__all__", ()):
                namespace[name] = getattr(module, name)
                names.add(name)
    return sorted(names)


@functools.cache  # asked for at every name that lightning_kd itself does not have
def family_packages() -> list[ModuleType]:
    """The packages of all families that exist, imported."""
    import lightning_kd

    present = {info.name for info in pkgutil.iter_modules(lightning_kd.__path__)}
    return [importlib.import_module(f"lightning_kd.{name}") for name in FAMILIES if name in present]
