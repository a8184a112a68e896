"""The base classes of label noise, and functions to draw labels from transition matrices."""

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
    """The training labels of a data set, and what else label noise may depend on.

    Attributes:
        target: int64 ``[N]``, the data set's own labels.
        class_names: a name for each class.
        image: uint8 ``[N, C, H, W]``, features float32 ``[N, D]``, a list of paths, or ``None`` where not available.
        file: the ``.npz`` that the data set is read from; ``None`` where there is none.
    """

    target: np.ndarray
    class_names: Sequence[str]
    image: Any = None
    file: Path | None = None

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


class DrawnLabels(ABC):
    """Labels that a method is trained on instead of a data set's own; the base class of noise, candidates and crowds.

    A subclass implements ``given_labels``, stores its arguments as attributes of the same names, and calls
    ``super().__init__(seed)``. A run folder records its ``repr``, which shows the public attributes. A subclass that
    reads a file also overrides ``without_files``; a resumed run then checks that the file still holds the same labels.

    Args:
        seed: the labels depend only on the seed and the data set; 0 or more.

    Raises:
        ValueError: for a seed that is not a whole number from 0 on.
    """

    def __init__(self, seed: int = 0) -> None:
        check_numbers(least=0, whole=True, seed=seed)
        self.seed = seed

    @property
    def nominal_rate(self) -> float:
        """The rate in this noise's own definition, not always the fraction of wrong labels; NaN without one."""
        return float(getattr(self, "rate", math.nan))

    def without_files(self) -> DrawnLabels:
        """A substitute that reads no file, for synthetic data; the object itself, unless it reads a file."""
        return self

    def corrupt(
        self,
        target: np.ndarray | Tensor | Sequence[int],
        class_names: Sequence[str] | int,
        image: Any = None,
        file: Path | None = None,
    ) -> np.ndarray:
        """The given labels, to be used instead of the labels of a data set.

        Args:
            target: the data set's own labels, integers ``[N]``.
            class_names: a name for each class, or their number.
            image: the samples, for noise that depends on them (see ``CleanLabels``).
            file: the ``.npz`` of the data set, for labels stored in it.

        Returns:
            a new array ``[N, ...]``, see ``given_labels``; the same in every call with the same seed.

        Raises:
            ValueError: for labels out of range, and where the labels drawn or read do not match the data set.
        """
        names = [str(c) for c in range(class_names)] if isinstance(class_names, int) else list(class_names)
        own = np.asarray(target)
        own = to_target(own, len(own), len(names), "clean labels").numpy()
        return self.given_labels(CleanLabels(own, names, image, file))

    @abstractmethod
    def given_labels(self, clean: CleanLabels) -> np.ndarray:
        """What ``corrupt`` returns, ``[N, ...]``, after checks; must not change ``clean``."""

    def __repr__(self) -> str:
        arguments = {k: v for k, v in vars(self).items() if not k.startswith("_")}
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in arguments.items())})"


class LabelNoise(DrawnLabels):
    """Label noise: replaces some of a data set's labels, to train on the result.

    A subclass implements ``draw``; see ``DrawnLabels`` for the arguments. With a nominal rate of 0 nothing is replaced.
    """

    @abstractmethod
    def draw(self, clean: CleanLabels, generator: np.random.Generator) -> np.ndarray:
        """Draw the given labels, integers ``[N]``, from this noise's own ``generator``; must not change ``clean``."""

    def given_labels(self, clean: CleanLabels) -> np.ndarray:
        """The given labels, int64 ``[N]``."""
        given = clean.target
        if self.nominal_rate != 0:
            given = self.draw(clean, numpy_generator(self.seed, "label_noise"))
        return to_target(np.asarray(given), len(clean.target), clean.num_classes, f"labels of {self}").numpy()


def check_rate(rate: float) -> float:
    """``rate`` as a float, if it is in [0, 1].

    Raises:
        ValueError: where it is not.
    """
    check_numbers(least=0, most=1, remedy="give the fraction of labels to corrupt", rate=rate)
    return float(rate)


def at_least_two(class_names: Sequence[str]) -> int:
    """The number of classes, if it is at least 2.

    Raises:
        ValueError: where it is not.
    """
    if len(class_names) < 2:
        raise ValueError(f"label noise needs 2 classes or more, got {len(class_names)}: give data of more classes")
    return len(class_names)


def check_transition(matrix: Any, num_classes: int | None = None, name: str = "matrix") -> np.ndarray:
    """``matrix`` as float64 ``[C, C]`` with each row divided by its sum, after checks.

    Raises:
        ValueError: where it is not square, not for ``num_classes`` classes, has a negative or infinite entry, or a row
            that does not sum to 1 within 1e-6.
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
    """Draw each label from the row of its class in a transition matrix.

    Args:
        target: int64 ``[N]``, the labels before.
        transition: float64 ``[C, C]``; entry ``[i, j]`` is the probability that label ``i`` becomes ``j``.
        generator: draws one uniform number per label, by which the row's cumulative distribution is inverted.

    Returns:
        int64 ``[N]``.
    """
    cumulative = transition.cumsum(1)
    cumulative /= cumulative[:, -1:]
    uniform = generator.random(len(target))
    given = np.empty(len(target), dtype=np.int64)
    for c in np.unique(target):
        of_class = target == c
        given[of_class] = cumulative[c].searchsorted(uniform[of_class], side="right")  # not "left", or 0.0 draws a zero
    return given


def estimate_transition(clean: np.ndarray, given: np.ndarray, num_classes: int) -> np.ndarray:
    """Estimate the transition matrix by counting: ``[i, j]`` is the fraction of class ``i`` that was labelled ``j``.

    Args:
        clean: int64 ``[N]``, the true labels.
        given: int64 ``[N]``, the given labels.
        num_classes: ``C``.

    Returns:
        float64 ``[C, C]`` with rows that sum to 1; the row of a class without a sample is that of the identity.
    """
    count = np.bincount(clean * num_classes + given, minlength=num_classes**2).reshape(num_classes, num_classes)
    count = np.where(count.sum(1, keepdims=True) == 0, np.eye(num_classes), count)
    return count / count.sum(1, keepdims=True)
