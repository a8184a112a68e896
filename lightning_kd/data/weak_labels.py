"""Several labels an image, made false or scarce: candidates, single positives, and few labelled images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.seeding import numpy_generator
from lightning_kd.data.candidates import candidates_from_uniforms
from lightning_kd.data.label_noise import CleanLabels, LabelNoise

__all__ = ["CandidateLabels", "SinglePositive", "WeakLabels", "labelled_split"]


@dataclass(frozen=True)
class CandidateLabels:
    """False labels beside the true ones: each label that an image has not becomes a candidate with ``rate``.

    Args:
        rate: in [0, 1).
        seed: fixes them, together with nothing but their number; 0 or more.

    Raises:
        ValueError: for an argument out of its range.
    """

    rate: float
    seed: int = 1

    def __post_init__(self) -> None:
        check_numbers(least=0, below=1, rate=self.rate)
        check_numbers(least=0, whole=True, seed=self.seed)


@dataclass(frozen=True)
class SinglePositive:
    """Of the labels of each image one, drawn at random, is kept.

    Args:
        others: what all other labels become, false ones too: ``"unknown"`` (-1) or ``"negative"`` (0).
        seed: fixes which are kept; 0 or more.

    Raises:
        ValueError: for an argument out of its range.
    """

    others: Literal["unknown", "negative"] = "unknown"
    seed: int = 1200

    def __post_init__(self) -> None:
        if self.others not in ("unknown", "negative"):
            raise ValueError(f"others must be 'unknown' or 'negative', got {self.others!r}: give one of them")
        check_numbers(least=0, whole=True, seed=self.seed)


def labelled_split(count: int, fraction: float, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Which of ``count`` images are labelled: the first ``int(fraction * count)`` of a permutation.

    It is that of ``numpy.random.RandomState``, as CAP and those compared with it split (arXiv 2305.02795, its code).

    Returns:
        the labelled and the others, int64, both in the order of the permutation.

    Raises:
        ValueError: where a share is out of (0, 1], or leaves no labelled image.
    """
    check_numbers(above=0, most=1, remedy="give a share", labelled_fraction=fraction)
    check_numbers(least=0, whole=True, labelled_seed=seed)
    labelled = int(fraction * count)
    if not labelled:
        raise ValueError(f"labelled_fraction={fraction} of {count} images leaves no labelled one: raise it")
    order = np.random.RandomState(seed).permutation(count)  # whose numbers are those of the papers
    return order[:labelled], order[labelled:]


class WeakLabels(LabelNoise):
    """What a data set of several labels an image is trained on, where ``candidates`` and so on are given.

    Args:
        candidates: see ``CandidateLabels``.
        single_positive: see ``SinglePositive``.
        labelled_fraction: the share of the training images that keep labels; those of the others are unknown.
        labelled_seed: see ``labelled_split``.
        indices: int64, the training images in use. The labels of others are left as they are.

    Raises:
        ValueError: for both candidates and single positives.
    """

    def __init__(
        self,
        candidates: CandidateLabels | None,
        single_positive: SinglePositive | None,
        labelled_fraction: float | None,
        labelled_seed: int,
        indices: np.ndarray,
    ) -> None:
        if candidates is not None and single_positive is not None:
            raise ValueError(
                f"candidates and single_positive exclude each other, got {candidates} and {single_positive}: leave one "
                "out"
            )
        check_numbers(above=0, most=1, optional=True, remedy="give a share", labelled_fraction=labelled_fraction)
        check_numbers(least=0, whole=True, labelled_seed=labelled_seed)
        self.candidates = candidates
        self.single_positive = single_positive
        self.labelled_fraction = labelled_fraction
        self.labelled_seed = labelled_seed
        self._indices = indices
        super().__init__((candidates or single_positive or CandidateLabels(0.0)).seed)

    @property
    def nominal_rate(self) -> float:
        return 0.0 if self.candidates is None else self.candidates.rate

    def labelled(self) -> np.ndarray:
        """The training images in use that keep labels, int64, ascending."""
        if self.labelled_fraction is None:
            return self._indices
        return np.sort(self._indices[labelled_split(len(self._indices), self.labelled_fraction, self.labelled_seed)[0]])

    def corrupt(
        self,
        target: Any,
        class_names: Sequence[str] | int,
        image: Any = None,
        file: Path | None = None,
    ) -> np.ndarray:
        """The given labels, int8 ``[N, C]`` of 1, 0 and -1 (not known), for ``target``, the data set's own."""
        own = np.asarray(target).astype(np.int8)
        names = [str(c) for c in range(own.shape[1])]
        stream = "candidates" if self.single_positive is None else "single_positive"
        drawn = self.draw(CleanLabels(own, names), numpy_generator(self.seed, stream))
        given = own.copy()
        given[self._indices] = -1
        labelled = self.labelled()
        given[labelled] = drawn[labelled]
        return given

    def draw(self, clean: CleanLabels, generator: np.random.Generator) -> np.ndarray:
        own = clean.target
        if self.single_positive is not None:
            chosen = np.where(own == 1, generator.random(own.shape), -1.0).argmax(1)
            given = np.full_like(own, -1 if self.single_positive.others == "unknown" else 0)
            rows = np.flatnonzero((own == 1).any(1))
            given[rows, chosen[rows]] = 1
            return given
        if self.candidates is None:
            return own
        # of all labels, so that it depends on their number and the seed alone
        drawn = candidates_from_uniforms((own == 1).astype(np.uint8), self.candidates.rate, generator.random(own.shape))
        return np.where(own < 0, -1, drawn).astype(np.int8)
