"""Made-up label noise, as the papers on learning with noisy labels define it."""

from __future__ import annotations

import hashlib
import random
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from lightning_kd.data.array_files import read_arrays
from lightning_kd.data.cifar import CIFAR10_CLASSES, CIFAR100_CLASSES, CIFAR100_COARSE
from lightning_kd.data.label_noise import (
    CleanLabels,
    LabelNoise,
    at_least_two,
    check_rate,
    check_transition,
    sample_transition,
)

CIFAR10_FLIPS = {9: 1, 2: 0, 3: 5, 5: 3, 4: 7}


class ClassNoise(LabelNoise):
    """Noise that depends on the class alone: each label is drawn, by itself, from a row of a transition matrix."""

    @abstractmethod
    def transition(self, class_names: Sequence[str]) -> np.ndarray:
        """float64 ``[C, C]``: entry ``[i, j]`` is the probability that label ``i`` becomes ``j``.

        Raises:
            ValueError: for classes that the noise is not made for.
        """

    def draw(self, clean: CleanLabels, generator: np.random.Generator) -> np.ndarray:
        return sample_transition(clean.target, self.transition(clean.class_names), generator)


class SymmetricNoise(ClassNoise):
    """Labels are wrong without a pattern. Papers mean two different things by that, so ``kind`` says which.

    With C classes, ``"inclusive"`` leaves ``rate * (1 - 1/C)`` of the labels wrong, ``"exclusive"`` ``rate``.

    Args:
        rate: 0 to 1.
        kind: ``"inclusive"`` gives exactly ``int(rate * N)`` random samples a uniform label out of all classes, also
            the true one (DivideMix, ELR, DPC); ``"exclusive"`` moves each label with probability ``rate`` to one of
            the other classes (GCE, SCE, Co-teaching); ``"dividemix"`` is inclusive, and bit for bit what DivideMix's
            code (Li et al., arXiv 2002.07394) draws where Python's generator has this ``seed``.
        seed: fixes the labels; 0 or more.

    Raises:
        ValueError: for an argument out of its range.
    """

    def __init__(
        self, rate: float, kind: Literal["inclusive", "exclusive", "dividemix"] = "inclusive", seed: int = 0
    ) -> None:
        if kind not in ("inclusive", "exclusive", "dividemix"):
            raise ValueError(f"kind must be 'inclusive', 'exclusive' or 'dividemix', got {kind!r}: give one of them")
        self.rate = check_rate(rate)
        self.kind = kind
        super().__init__(seed)

    def transition(self, class_names: Sequence[str]) -> np.ndarray:
        count = at_least_two(class_names)
        other = self.rate / (count - 1 if self.kind == "exclusive" else count)
        table = np.full((count, count), other)
        np.fill_diagonal(table, 1 - (count - 1) * other)
        return table

    def draw(self, clean: CleanLabels, generator: np.random.Generator) -> np.ndarray:
        if self.kind == "exclusive":
            return super().draw(clean, generator)
        count = len(clean.target)
        touched = int(self.rate * count)
        given = clean.target.copy()
        if self.kind == "inclusive":
            given[generator.permutation(count)[:touched]] = generator.integers(clean.num_classes, size=touched)
        else:
            python = random.Random(self.seed)
            order = list(range(count))
            python.shuffle(order)
            # in ascending order of index, as the code that is reproduced asks for each sample in turn
            for i in sorted(order[:touched]):
                given[i] = python.randint(0, clean.num_classes - 1)
        return given


class PairFlipNoise(ClassNoise):
    """Each label moves to the next class, the last one to the first, with probability ``rate`` (Co-teaching).

    Args:
        rate: 0 to 1.
        seed: fixes the labels; 0 or more.

    Raises:
        ValueError: for an argument out of its range.
    """

    def __init__(self, rate: float, seed: int = 0) -> None:
        self.rate = check_rate(rate)
        super().__init__(seed)

    def transition(self, class_names: Sequence[str]) -> np.ndarray:
        count = at_least_two(class_names)
        return flips({c: (c + 1) % count for c in range(count)}, self.rate, count)


class AsymmetricNoise(ClassNoise):
    """Classes are taken for similar ones. For CIFAR-10 and the 100 fine classes of CIFAR-100 only.

    On CIFAR-10 truck becomes automobile, bird airplane, deer horse, and cat and dog each other; the other classes keep
    their labels, so that half of ``rate`` is wrong. On CIFAR-100 a class becomes the next one of its group of five, the
    last one the first, and ``rate`` is wrong.

    Args:
        rate: 0 to 1.
        kind: on CIFAR-10 ``"iid"``, each label of the five classes with probability ``rate`` (DPC), or
            ``"exact_subset"``, those among exactly ``int(rate * N)`` random samples of all classes (DivideMix). On
            CIFAR-100 ``"superclass"``, groups of the 20 superclasses, or ``"blocks"``, of neighbours in the alphabet,
            which are not alike (ELR's code). By default ``"iid"`` and ``"superclass"``.
        seed: fixes the labels; 0 or more.

    Raises:
        ValueError: for an argument out of its range; when drawn, for another data set, and for a ``kind`` that is not
            one of this data set.
    """

    def __init__(
        self,
        rate: float,
        kind: Literal["iid", "exact_subset", "superclass", "blocks"] | None = None,
        seed: int = 0,
    ) -> None:
        kinds = ("iid", "exact_subset", "superclass", "blocks")
        if kind is not None and kind not in kinds:
            raise ValueError(f"kind must be one of {', '.join(kinds)}, got {kind!r}: give one, or none for the usual")
        self.rate = check_rate(rate)
        self.kind = kind
        super().__init__(seed)

    def transition(self, class_names: Sequence[str]) -> np.ndarray:
        return flips(self._flips(class_names), self.rate, len(class_names))

    def draw(self, clean: CleanLabels, generator: np.random.Generator) -> np.ndarray:
        if self.kind != "exact_subset":
            return super().draw(clean, generator)
        step = self._flips(clean.class_names)
        after = np.array([step.get(c, c) for c in range(clean.num_classes)])
        given = clean.target.copy()
        touched = generator.permutation(len(given))[: int(self.rate * len(given))]
        given[touched] = after[given[touched]]
        return given

    def _flips(self, class_names: Sequence[str]) -> dict[int, int]:
        names = list(class_names)
        if names == CIFAR10_CLASSES and self.kind in (None, "iid", "exact_subset"):
            return CIFAR10_FLIPS
        if names == CIFAR100_CLASSES and self.kind in (None, "superclass"):
            return next_in_group(CIFAR100_COARSE)
        if names == CIFAR100_CLASSES and self.kind == "blocks":
            return next_in_group([c // 5 for c in range(100)])
        raise ValueError(
            f"AsymmetricNoise of kind {self.kind!r} got {len(names)} classes, {', '.join(names[:3])}, ...: "
            "CIFAR-10 has 'iid' and 'exact_subset', CIFAR-100 'superclass' and 'blocks'; use TransitionNoise elsewhere"
        )


class TransitionNoise(ClassNoise):
    """Each label is drawn from a transition matrix of your own.

    Args:
        matrix: rows ``[C, C]``, entry ``[i, j]`` the probability that label ``i`` becomes ``j``; or the path of a
            ``.npy``, ``.npz`` (of one array) or ``.csv`` file (commas, no header) that holds it.
        seed: fixes the labels; 0 or more.

    Raises:
        ValueError: for a matrix that is not square, has a negative entry or a row that does not sum to 1 within 1e-6;
            when drawn, for one that does not fit the number of classes.
        FileNotFoundError: when drawn, where there is no such file.
    """

    def __init__(self, matrix: list[list[float]] | str, seed: int = 0) -> None:
        self.matrix = matrix
        if not isinstance(matrix, str):
            check_transition(matrix)
        super().__init__(seed)

    @property
    def nominal_rate(self) -> float:
        return float("nan")

    def without_files(self) -> LabelNoise:
        # the classes of made-up data may be others than the file's
        return SymmetricNoise(0.4, "exclusive", self.seed) if isinstance(self.matrix, str) else self

    def transition(self, class_names: Sequence[str]) -> np.ndarray:
        matrix = self.matrix
        return check_transition(read_matrix(matrix) if isinstance(matrix, str) else matrix, len(class_names))

    def __repr__(self) -> str:
        matrix = self.matrix
        if not isinstance(matrix, str):  # a hundred rows would fill the screen
            table = np.asarray(matrix, dtype="<f8")
            matrix = f"{len(table)} classes, sha256 {hashlib.sha256(table.tobytes()).hexdigest()[:12]}"
        return f"TransitionNoise(matrix={matrix!r}, seed={self.seed})"


def flips(step: dict[int, int], rate: float, num_classes: int) -> np.ndarray:
    """The transition matrix float64 ``[C, C]`` by which class ``i`` becomes ``step[i]`` with probability ``rate``."""
    table = np.eye(num_classes)
    for source, to in step.items():
        table[source, source] = 1 - rate
        table[source, to] = rate
    return table


def next_in_group(group: Sequence[int]) -> dict[int, int]:
    """For each class the next one of its group, from the last one back to the first; ``group[c]`` is that of ``c``."""
    step: dict[int, int] = {}
    for value in set(group):
        members = [c for c, g in enumerate(group) if g == value]
        step.update(zip(members, members[1:] + members[:1], strict=True))
    return step


def read_matrix(path: str) -> np.ndarray:
    """A table of numbers from a ``.npy``, an ``.npz`` of one array, or a ``.csv`` without header.

    Raises:
        FileNotFoundError, PermissionError: if there is no such file, or it may not be read.
        ValueError: if it is damaged, or is none of the three.
    """
    if Path(path).suffix == ".csv":
        try:
            return np.loadtxt(path, delimiter=",", ndmin=2)
        except FileNotFoundError:
            raise FileNotFoundError(f"matrix={path!r} does not exist: give the path of a .npy, .npz or .csv") from None
        except (ValueError, UnicodeDecodeError) as error:
            raise ValueError(f"matrix={path!r} is no table of numbers ({error}): give commas and no header") from error
    arrays = read_arrays(Path(path))
    if len(arrays) != 1:
        raise ValueError(
            f"matrix={path!r} must hold one array, got {', '.join(arrays) or 'none'}: store only the matrix"
        )
    return next(iter(arrays.values()))
