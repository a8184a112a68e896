"""An ensemble of teachers: the mean of their probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.losses import at_least_float32
from lightning_kd.core.teacher import FrozenTeacher, checked_size

__all__ = ["TeacherEnsemble", "teacher_settings"]


class TeacherEnsemble(nn.Module):
    """Several frozen teachers for single-label classification, each with its own input size and normalisation.

    Args:
        teachers: one or more teachers.
    """

    def __init__(self, teachers: Sequence[FrozenTeacher]) -> None:
        super().__init__()
        self.teachers: Any = nn.ModuleList(teachers)
        self.eval()

    def train(self, mode: bool = True) -> TeacherEnsemble:
        return super().train(False)

    def each(self, image: Tensor) -> list[Tensor]:
        """The logits ``[B, C]`` of each teacher, without gradient, in their order."""
        return [teacher(image) for teacher in self.teachers]

    def forward(self, image: Tensor) -> Tensor:
        """The logarithm of the teachers' mean probabilities, ``[B, C]``, float32 or wider; its softmax is that mean."""
        logs = torch.stack([logits.log_softmax(1) for logits in at_least_float32(*self.each(image))])
        return logs.logsumexp(0) - math.log(len(logs))


def teacher_settings(teacher: Any, channels: int, **values: Any) -> list[dict[str, Any]]:
    """The settings of each teacher, from the arguments of a distillation.

    Args:
        teacher: a network's name or a module, or a list of them.
        channels: number of channels of the images.
        values: ``weights``, ``mean``, ``std`` and ``size``. With a list of teachers, each is either one value for all
            teachers (a text, a path, ``None``, a number; for ``mean`` and ``std`` also a list of numbers, one for each
            channel) or a list with one value for each teacher.

    Returns:
        A dict for each teacher: the values by name, and ``name``, the network's name or ``None``; ``size`` is
        ``(height, width)``.

    Raises:
        ValueError: for a list of wrong length, and for wrong values.
    """
    several = isinstance(teacher, list | tuple)
    found: list[dict[str, Any]] = [
        {"name": one if isinstance(one, str) else None} for one in (teacher if several else [teacher])
    ]
    for name, value in values.items():
        for_all = not several or value is None or isinstance(value, str | PathLike | Real)
        if name in ("mean", "std") and not for_all:
            for_all = all(isinstance(one, Real) for one in value)
        if not for_all and len(value) != len(found):
            raise ValueError(
                f"teacher_{name} must be one for all {len(found)} teachers or a list of {len(found)}, got "
                f"{list(value)}: give one for each teacher, in their order"
            )
        for k, settings in enumerate(found):
            settings[name] = _checked(name, value if for_all else value[k], channels)
    return found


def _checked(name: str, value: Any, channels: int) -> Any:
    if name == "size":
        return checked_size(value)
    if name == "weights" and isinstance(value, list | tuple):
        raise ValueError(
            f"teacher_weights must be one file for one teacher, got {list(value)}: give teacher as a list, too"
        )
    if name in ("mean", "std") and value is not None:
        if len(value) != channels:
            raise ValueError(
                f"teacher_{name} needs {channels} values, as the images have {channels} channels, got {list(value)}: "
                "give one for each channel"
            )
        for one in value:
            check_numbers({f"teacher_{name}": one}, above=0 if name == "std" else None)
    return value
