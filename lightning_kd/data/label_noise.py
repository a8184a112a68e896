"""What every kind of label noise has in common: its interface, and sampling from a transition matrix."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.seeding import numpy_generator
from lightning_kd.data.array_files import to_target


@dataclass(frozen=True)
class CleanLabels:
    """A data set's own training labels, and what else a noise may look at.

    Attributes:
        target: int64 ``[N]``.
        class_names: one for each class.
        image: uint8 ``[N, C, H, W]``, features float32 ``[N, D]``, a list of paths, or ``None`` where not at hand.
        file: the ``.npz`` that the data set is read from, ``None`` where there is none.
    """

    target: np.ndarray
    class_names: Sequence[str]
    image: Any = None
    file: Path | None = None

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


class DrawnLabels(ABC):
    """What a method is trained on in the place of a data set's own labels, and a run folder keeps.

    A subclass has ``given_labels``, keeps its arguments as attributes of the same names, and calls
    ``super().__init__(seed)``. Its public attributes are what a run folder remembers it by; one that reads a file also
    overrides ``without_files``, and then a resumed run asks whether the file still holds the same labels.

    Args:
        seed: fixes the labels, together with nothing else; 0 or more.

    Raises:
        ValueError: for a seed that is not a whole number from 0 on.
    """

    def __init__(self, seed: int = 0) -> None:
        check_numbers(least=0, whole=True, seed=seed)
        self.seed = seed

    @property
    def nominal_rate(self) -> float:
        """The rate in its own definition, not always the share of wrong labels; NaN where there is none."""
        return float(getattr(self, "rate", math.nan))

    def without_files(self) -> DrawnLabels:
        """What stands in for it on made-up data: itself, unless it reads a file."""
        return self

    def corrupt(
        self,
        target: np.ndarray | Tensor | Sequence[int],
        class_names: Sequence[str] | int,
        image: Any = None,
        file: Path | None = None,
    ) -> np.ndarray:
        """What is given in the place of the labels of a data set.

        Args:
            target: the data set's own labels ``[N]``.
            class_names: a name for each class, or only their number.
            image: the samples, for what depends on them (see ``CleanLabels``).
            file: the ``.npz`` of the data set, for what is stored in it.

        Returns:
            a new array ``[N, ...]``, see ``given_labels``; the same one for the same seed, whatever was drawn elsewhere
            before.

        Raises:
            ValueError: for labels out of range, and where what is drawn or read does not fit the data set.
        """
        names = [str(c) for c in range(class_names)] if isinstance(class_names, int) else list(class_names)
        own = np.asarray(target)
        own = to_target(own, len(own), len(names), "clean labels").numpy()
        return self.given_labels(CleanLabels(own, names, image, file))

    @abstractmethod
    def given_labels(self, clean: CleanLabels) -> np.ndarray:
        """What ``corrupt`` returns, ``[N, ...]``, checked; ``clean`` is not to be changed."""

    def __repr__(self) -> str:
        arguments = {k: v for k, v in vars(self).items() if not k.startswith("_")}
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in arguments.items())})"


class LabelNoise(DrawnLabels):
    """Turns a data set's own labels into the given labels that a method is trained on.

    A subclass implements ``draw``; see ``DrawnLabels`` for its arguments. A nominal rate of 0 gives the own labels.
    """

    @abstractmethod
    def draw(self, clean: CleanLabels, generator: np.random.Generator) -> np.ndarray:
        """The given labels, integers ``[N]``; ``clean`` is not to be changed, and ``generator`` is this noise's own."""

    def given_labels(self, clean: CleanLabels) -> np.ndarray:
        """Int64 ``[N]``."""
        given = clean.target
        if self.nominal_rate != 0:
            given = self.draw(clean, numpy_generator(self.seed, "label_noise"))
        return to_target(np.asarray(given), len(clean.target), clean.num_classes, f"labels of {self}").numpy()


def check_rate(rate: float) -> float:
    """``rate`` as a float.

    Raises:
        ValueError: where it is not from 0 to 1.
    """
    check_numbers(least=0, most=1, remedy="give the share of labels to corrupt", rate=rate)
    return float(rate)


def at_least_two(class_names: Sequence[str]) -> int:
    """The number of classes.

    Raises:
        ValueError: where it is below 2.
    """
    if len(class_names) < 2:
        raise ValueError(
            f"label noise needs 2 classes or more, got {len(class_names)}: there is no other label to take"
        )
    return len(class_names)


def check_transition(matrix: Any, num_classes: int | None = None, name: str = "matrix") -> np.ndarray:
    """``matrix`` as float64 ``[C, C]``, rows scaled to sum to 1 exactly.

    Raises:
        ValueError: where it is not square, not of ``num_classes``, has a negative or infinite entry, or a row that does
            not sum to 1 within 1e-6.
    """
    try:
        table = np.asarray(matrix, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(
            f"{name} must be a square table of numbers, got {matrix!r:.80}: give rows of one length"
        ) from None
    if table.ndim != 2 or table.shape[0] != table.shape[1] or not table.size:
        raise ValueError(f"{name} must be square, got shape {table.shape}: give one row and one column for each class")
    if num_classes is not None and len(table) != num_classes:
        raise ValueError(f"{name} is for {len(table)} classes, got a data set of {num_classes}: give one row for each")
    if not np.isfinite(table).all() or (table < 0).any():
        at = np.argwhere(~np.isfinite(table) | (table < 0))[0]
        raise ValueError(
            f"{name} must hold probabilities, got {table[tuple(at)]} at {tuple(at.tolist())}: give values from 0 on"
        )
    sums = table.sum(1)
    if (wrong := np.abs(sums - 1) > 1e-6).any():
        row = int(wrong.argmax())
        raise ValueError(f"{name} must have rows that sum to 1, got {sums[row]:.8g} in row {row}: divide it by its sum")
    return table / sums[:, None]


def sample_transition(target: np.ndarray, transition: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Draw each label anew from the row of its class, by the inverse of the cumulative distribution.

    Args:
        target: int64 ``[N]``.
        transition: float64 ``[C, C]``, entry ``[i, j]`` the probability that label ``i`` becomes ``j``.
        generator: gives one number for each label, whatever its class.

    Returns:
        int64 ``[N]``.
    """
    cumulative = transition.cumsum(1)
    cumulative /= cumulative[:, -1:]
    uniform = generator.random(len(target))
    given = np.empty(len(target), dtype=np.int64)
    for c in np.unique(target):
        of_class = target == c
        given[of_class] = cumulative[c].searchsorted(uniform[of_class], side="right")  # right: never a probability of 0
    return given


def estimate_transition(clean: np.ndarray, given: np.ndarray, num_classes: int) -> np.ndarray:
    """The transition matrix from counts: entry ``[i, j]`` is the share of class ``i`` that was labelled ``j``.

    Args:
        clean: int64 ``[N]``.
        given: int64 ``[N]``.
        num_classes: C.

    Returns:
        float64 ``[C, C]``, rows summing to 1. A class without a sample keeps its labels.
    """
    count = np.bincount(clean * num_classes + given, minlength=num_classes**2).reshape(num_classes, num_classes)
    count = np.where(count.sum(1, keepdims=True) == 0, np.eye(num_classes), count)
    return count / count.sum(1, keepdims=True)
