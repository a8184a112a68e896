"""The arguments of a module that go into its checkpoints: plain values only."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np

__all__ = ["keep_plain_hyperparameters", "without_module_warning"]

_NOT_PLAIN = object()


@contextmanager
def without_module_warning() -> Iterator[None]:
    """A context without Lightning's warning about modules in ``save_hyperparameters``; they are removed afterwards."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is an instance of `nn.Module`.*")
        yield


def keep_plain_hyperparameters(module: L.LightningModule) -> None:
    """Call it after ``save_hyperparameters``: it removes all but plain values, since loading objects needs pickle."""
    for key, value in list(module.hparams.items()):
        plain = _plain(value)
        for stored in (module.hparams, module._hparams_initial):
            if plain is _NOT_PLAIN:
                stored.pop(key, None)  # type: ignore[union-attr, operator]
            else:
                stored[key] = plain  # type: ignore[index, operator]


def _plain(value: Any) -> Any:
    """``value`` in a form that ``torch.load(weights_only=True)`` reads, or ``_NOT_PLAIN``."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        parts = {str(k): _plain(v) for k, v in value.items()}
        return _NOT_PLAIN if any(v is _NOT_PLAIN for v in parts.values()) else parts
    if isinstance(value, list | tuple):
        items = [_plain(v) for v in value]
        return (
            _NOT_PLAIN if any(v is _NOT_PLAIN for v in items) else (items if isinstance(value, list) else tuple(items))
        )
    return _NOT_PLAIN
