"""Finding methods and data modules in the package, so that a new method needs no entry in any list."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from types import ModuleType
from typing import Any

FAMILIES = ("distillation", "active_learning", "noisy_labels", "flatness", "multi_label", "weak_labels")


def export_modules(package: str, namespace: dict[str, Any]) -> list[str]:
    """Import every module of ``package`` and put the names in its ``__all__`` into ``namespace``.

    Call it in a package's ``__init__`` as ``__all__ = export_modules(__name__, globals())``. Modules whose names begin
    with an underscore are left out.

    Returns:
        The names, sorted.
    """
    names: set[str] = set()  # two modules may export the same name
    for info in pkgutil.iter_modules(namespace["__path__"]):
        if not info.name.startswith("_"):
            module = importlib.import_module(f"{package}.{info.name}")
            for name in getattr(module, "__all__", ()):
                namespace[name] = getattr(module, name)
                names.add(name)
    return sorted(names)


@functools.cache  # called for every name that is looked up in lightning_kd
def family_packages() -> list[ModuleType]:
    """The packages of all families of methods, imported."""
    import lightning_kd

    present = {info.name for info in pkgutil.iter_modules(lightning_kd.__path__)}
    return [importlib.import_module(f"lightning_kd.{name}") for name in FAMILIES if name in present]
