"""The classes that an option takes by name alone, without their module."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Iterable, Iterator

import lightning as L
from jsonargparse import ArgumentParser
from lightning.pytorch.loggers import Logger
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_kd.core.task import Task
from lightning_kd.data import LabelNoise

__all__ = ["argument_names", "find_class", "known_classes", "near_names"]

_BASES: dict[str, type] = {
    "model": Task,
    "data": L.LightningDataModule,
    "source": L.LightningDataModule,
    "noise": LabelNoise,
    "optimizer": Optimizer,
    "base_optimizer": Optimizer,
    "lr_scheduler": LRScheduler,
    "callbacks": L.Callback,
    "logger": Logger,
}
_GIVEN_BY_US = {Optimizer: {"params"}, LRScheduler: {"optimizer"}}


def known_classes(key: str) -> dict[str, type]:
    """The classes that ``--key`` takes, by name: all imported subclasses of its base; ``nn.Module`` by default."""
    base = _BASES.get(key.rpartition(".")[2], nn.Module)
    found: dict[str, type] = {}
    for cls in _subclasses(base):
        if not _is_base(cls) and (cls.__name__ not in found or cls.__module__.startswith("lightning_kd.")):
            found[cls.__name__] = cls
    return dict(sorted(found.items()))


def _is_base(cls: type) -> bool:
    return (
        cls.__name__.startswith("_")
        or cls.__name__.endswith("Task")
        or inspect.isabstract(cls)
        or cls.__module__ == "lightning.pytorch.cli"
    )


def _subclasses(base: type) -> Iterator[type]:
    cls: type
    for cls in base.__subclasses__():
        yield cls
        yield from _subclasses(cls)


def find_class(key: str, name: str) -> type:
    """The class that ``--key name`` means, by its name or by its import path.

    Raises:
        ValueError: if there is none, with the nearest names.
    """
    module, _, own_name = name.rpartition(".")
    if module:
        try:
            found = getattr(importlib.import_module(module), own_name)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"--{key} {name!r} cannot be imported: {error}") from error
        if inspect.isclass(found):
            return found
        raise ValueError(f"--{key} {name!r} is not a class: name one")
    known = known_classes(key)
    if name not in known:
        raise ValueError(f"--{key} {name!r} is not known{near_names(name, known)}")
    return known[name]


def near_names(name: str, known: Iterable[str], prefix: str = "") -> str:
    """``: did you mean ...?`` with the nearest known names, each after ``prefix``; empty if none is near."""
    by_lower = {known_name.lower(): known_name for known_name in known}
    near = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.6)
    return f": did you mean {', '.join(prefix + by_lower[found] for found in near)}?" if near else ""


def argument_names(cls: type) -> list[str]:
    """The arguments of ``cls`` that can be given in a config, including those that ``**kwargs`` pass to parents."""
    skip = {name for base, names in _GIVEN_BY_US.items() if issubclass(cls, base) for name in names}
    added = ArgumentParser(exit_on_error=False).add_class_arguments(cls, "of", fail_untyped=False, skip=skip)
    return [name.removeprefix("of.") for name in added]
