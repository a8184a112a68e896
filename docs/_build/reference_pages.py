"""A page for each public package: what its ``__all__`` names, with the docstrings."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import pkgutil
from pathlib import Path
from types import ModuleType

import lightning_kd


@functools.cache
def public_packages() -> tuple[str, ...]:
    """The packages that say by ``__all__`` what they offer."""
    names = sorted(info.name for info in pkgutil.iter_modules(lightning_kd.__path__) if info.ispkg)
    return tuple(name for name in names if hasattr(_package(name), "__all__"))


def reference_index() -> str:
    """The list of packages, with the first line of each docstring."""
    rows = [f"| [`lightning_kd.{name}`]({name}.md) | {_first_line(_package(name))} |" for name in public_packages()]
    said = (
        "What each package's `__all__` names. Methods, data modules, networks and callbacks can be imported from "
        "`lightning_kd` itself, too: `from lightning_kd import DHKD, CIFAR100DataModule`. What is not here may change "
        "without notice."
    )
    return "\n\n".join(["# Reference", said, "\n".join(["| package | |", "| --- | --- |", *rows])]) + "\n"


def reference_page(name: str) -> str:
    """The page of a package."""
    package = _package(name)
    parts = [f"# lightning_kd.{name}", inspect.getdoc(package) or ""]
    parts += [f"::: {path_of(package, public)}" for public in package.__all__]
    return "\n\n".join(parts) + "\n"


def path_of(package: ModuleType, name: str) -> str:
    """Where the source of a public name is, which its package may hand on.

    Raises:
        ValueError: where no module of the package defines it.
    """
    module = getattr(getattr(package, name), "__module__", None)
    if isinstance(module, str) and module.startswith("lightning_kd."):
        return f"{module}.{name}"
    for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if name in _assigned(Path(importlib.import_module(info.name).__file__ or "")):
            return f"{info.name}.{name}"
    if name in _assigned(Path(package.__file__ or "")):
        return f"{package.__name__}.{name}"
    raise ValueError(f"{package.__name__} offers {name}, which none of its modules defines: correct its __all__")


def _package(name: str) -> ModuleType:
    return importlib.import_module(f"lightning_kd.{name}")


def _first_line(package: ModuleType) -> str:
    return (inspect.getdoc(package) or "").partition("\n")[0]


@functools.cache
def _assigned(path: Path) -> set[str]:
    """The names that a file gives values to at its top level."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found
