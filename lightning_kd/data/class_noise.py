"""Synthetic label noise that depends on the class, as defined in papers on noisy labels."""

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
    """Noise that depends only on the class: each label is drawn independently from a row of a transition matrix."""

    @abstractmethod
    def transition(self, class_names: Sequence[str]) -> np.ndarray:
        """float64 ``[C, C]``: entry ``[i, j]`` is the probability that label ``i`` becomes ``j``.

        Raises:
            ValueError: for classes that the noise is not defined for.
        """

    def draw(self, clean: CleanLabels, generator: np.random.Generator) -> np.ndarray:
        return sample_transition(clean.target, self.transition(clean.class_names), generator)


class SymmetricNoise(ClassNoise):
    """Replaces labels by uniformly random ones. Papers define this in two ways; ``kind`` says which.

    With C classes, a fraction of ``rate * (1 - 1/C)`` of the labels is wrong for ``"inclusive"``, and ``rate`` for
    ``"exclusive"``.

    Args:
        rate: noise rate in [0, 1].
        kind: ``"inclusive"`` gives exactly ``int(rate * N)`` random samples a label drawn from all classes, the true
            one included (DivideMix, ELR, DPC). ``"exclusive"`` replaces each label with probability ``rate`` by one of
            the other classes (GCE, SCE, Co-teaching). ``"dividemix"`` is inclusive and draws the same labels as the
            code of DivideMix (Li et al., arXiv 2002.07394) with Python's generator seeded by ``seed``.
        seed: fixes the labels; 0 or more.

    Raises:
        ValueError: for an argument out of its range.
    """

    def __init__(
        self, rate: float, kind: Literal["inclusive", "exclusive", "dividemix"] = "inclusive", seed: int = 0
    ) -> None:
        if kind not in ("inclusive", "exclusive", "dividemix"):
            raise ValueError(f"kind must be 'inclusive', 'exclusive' or 'dividemix', got {kind!r}: choose one")
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
            # in ascending order of index, because DivideMix's code draws while it loops over the samples
            for i in sorted(order[:touched]):
                given[i] = python.randint(0, clean.num_classes - 1)
        return given


class PairFlipNoise(ClassNoise):
    """Replaces each label with probability ``rate`` by the next class, the last class by the first (Co-teaching).

    Args:
        rate: noise rate in [0, 1].
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
    """Replaces labels by those of similar classes. Only for CIFAR-10 and the 100 fine classes of CIFAR-100.

    On CIFAR-10 truck becomes automobile, bird airplane, deer horse, cat dog and dog cat; the other five classes keep
    their labels, so about half of ``rate`` of all labels is wrong. On CIFAR-100 each class becomes the next one in its
    group of five classes, the last one the first, so ``rate`` of all labels is wrong.

    Args:
        rate: noise rate in [0, 1].
        kind: on CIFAR-10, ``"iid"`` changes each label of the five classes with probability ``rate`` (DPC), and
            ``"exact_subset"`` those among exactly ``int(rate * N)`` random samples of all classes (DivideMix). On
            CIFAR-100, ``"superclass"`` takes the 20 superclasses as groups, and ``"blocks"`` takes blocks of the
            alphabetical order, whose classes are not similar (the code of ELR). Default: ``"iid"`` and
            ``"superclass"``.
        seed: fixes the labels; 0 or more.

    Raises:
        ValueError: for an argument out of its range; when drawn, for another data set, or a ``kind`` of the other data
            set.
    """

    def __init__(
        self,
        rate: float,
        kind: Literal["iid", "exact_subset", "superclass", "blocks"] | None = None,
        seed: int = 0,
    ) -> None:
        kinds = ("iid", "exact_subset", "superclass", "blocks")
        if kind is not None and kind not in kinds:
            raise ValueError(f"kind must be one of {', '.join(kinds)}, got {kind!r}: choose one, or None")
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
            f"AsymmetricNoise of kind {self.kind!r} got {len(names)} classes, {', '.join(names[:3])}, ...: use 'iid' "
            "or 'exact_subset' for CIFAR-10, 'superclass' or 'blocks' for CIFAR-100, and TransitionNoise for other data"
        )


class TransitionNoise(ClassNoise):
    """Draws each label from a transition matrix that you give.

    Args:
        matrix: rows ``[C, C]``, entry ``[i, j]`` the probability that label ``i`` becomes ``j``; or the path of a
            ``.npy``, ``.npz`` (of one array) or ``.csv`` file (commas, no header) that holds it.
        seed: fixes the labels; 0 or more.

    Raises:
        ValueError: for a matrix that is not square, has a negative entry or a row that does not sum to 1 within 1e-6;
            when drawn, for another number of classes.
        FileNotFoundError: when drawn, where the file does not exist.
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
        # synthetic data may have another number of classes than the file
        return SymmetricNoise(0.4, "exclusive", self.seed) if isinstance(self.matrix, str) else self

    def transition(self, class_names: Sequence[str]) -> np.ndarray:
        matrix = self.matrix
        return check_transition(read_matrix(matrix) if isinstance(matrix, str) else matrix, len(class_names))

    def __repr__(self) -> str:
        matrix = self.matrix
        if not isinstance(matrix, str):  # a matrix of 100 classes would be too long
            table = np.asarray(matrix, dtype="<f8")
            matrix = f"{len(table)} classes, sha256 {hashlib.sha256(table.tobytes()).hexdigest()[:12]}"
        return f"TransitionNoise(matrix={matrix!r}, seed={self.seed})"


def flips(step: dict[int, int], rate: float, num_classes: int) -> np.ndarray:
    """The transition matrix, float64 ``[C, C]``, in which class ``i`` becomes ``step[i]`` with probability ``rate``."""
    table = np.eye(num_classes)
    for source, to in step.items():
        table[source, source] = 1 - rate
        table[source, to] = rate
    return table


def next_in_group(group: Sequence[int]) -> dict[int, int]:
    """For each class the next class of its group, for the last one the first; ``group[c]`` is that of class ``c``."""
    step: dict[int, int] = {}
    for value in set(group):
        members = [c for c, g in enumerate(group) if g == value]
        step.update(zip(members, members[1:] + members[:1], strict=True))
    return step


def read_matrix(path: str) -> np.ndarray:
    """Read a table of numbers from a ``.npy``, an ``.npz`` of one array, or a ``.csv`` without a header.

    Raises:
        FileNotFoundError, PermissionError: where the file does not exist, or may not be read.
        ValueError: where it is damaged, or is none of the three.
    """
    if Path(path).suffix == ".csv":
        try:
            return np.loadtxt(path, delimiter=",", ndmin=2)
        except FileNotFoundError:
            raise FileNotFoundError(f"matrix={path!r} does not exist: give the path of a .npy, .npz or .csv") from None
        except (ValueError, UnicodeDecodeError) as error:
            raise ValueError(f"matrix={path!r} is not a table of numbers ({error}): use commas, no header") from error
    arrays = read_arrays(Path(path), "matrix")
    if len(arrays) != 1:
        raise ValueError(
            f"matrix={path!r} must hold one array, got {', '.join(arrays) or 'none'}: store only the matrix"
        )
    return next(iter(arrays.values()))
