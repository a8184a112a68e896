"""A Trainer with methods for the verbs of lightning_kd, for the command line and for Python."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import lightning as L

from lightning_kd.cli.usage import OWN_VERBS

__all__ = ["NO_RUN", "RunTrainer", "verb_module"]

# arguments of the Trainer for verbs without a run folder
NO_RUN = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "callbacks": []}


class RunTrainer(L.Trainer):
    """A Trainer with a method for each verb of ``usage.OWN_VERBS``: ``trainer.shift(model, datamodule, ...)``.

    It works in the run folder ``default_root_dir``.

    Attributes:
        answer: the return value of the last of these methods.
    """

    answer: Any = None


def verb_module(verb: str) -> Any:
    """The module of one of the verbs in ``OWN_VERBS``."""
    return importlib.import_module(OWN_VERBS[verb].module)


def _method(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def method(self: RunTrainer, *args: Any, **kwargs: Any) -> Any:
        self.answer = function(self, *args, **kwargs)
        return self.answer

    return method


for _name in OWN_VERBS:
    setattr(RunTrainer, _name, _method(getattr(verb_module(_name), _name)))
