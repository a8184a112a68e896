"""Weakens multi-label targets: candidates with false labels, single positives, and few labelled images."""

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
    """Adds each false label of an image to its labels, as a candidate, with probability ``rate``.

    Args:
        rate: probability in [0, 1).
        seed: the candidates depend only on the seed and the number of labels; 0 or more.

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
    """Keeps one positive label of each image, drawn at random.

    Args:
        others: value of all other labels, false ones included: ``"unknown"`` (-1) or ``"negative"`` (0).
        seed: fixes which labels are kept; 0 or more.

    Raises:
        ValueError: for an argument out of its range.
    """

    others: Literal["unknown", "negative"] = "unknown"
    seed: int = 1200

    def __post_init__(self) -> None:
        if self.others not in ("unknown", "negative"):
            raise ValueError(f"others must be 'unknown' or 'negative', got {self.others!r}: choose one")
        check_numbers(least=0, whole=True, seed=self.seed)


def labelled_split(count: int, fraction: float, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Choose which of ``count`` images are labelled: the first ``int(fraction * count)`` of a permutation.

    The permutation is that of ``numpy.random.RandomState(seed)``, as in the code of CAP (arXiv 2305.02795) and of the
    methods compared with it.

    Returns:
        positions of the labelled images and of the others, int64, both in the order of the permutation.

    Raises:
        ValueError: where ``fraction`` is not in (0, 1], or leaves no labelled image.
    """
    check_numbers(above=0, most=1, remedy="give a fraction", labelled_fraction=fraction)
    check_numbers(least=0, whole=True, labelled_seed=seed)
    labelled = int(fraction * count)
    if not labelled:
        raise ValueError(f"labelled_fraction={fraction} of {count} images leaves no labelled image: raise it")
    order = np.random.RandomState(seed).permutation(count)  # the legacy generator, as in the papers' code
    return order[:labelled], order[labelled:]


class WeakLabels(LabelNoise):
    """The given labels of a multi-label data set with ``candidates``, ``single_positive`` or ``labelled_fraction``.

    Args:
        candidates: see ``CandidateLabels``.
        single_positive: see ``SinglePositive``.
        labelled_fraction: fraction of the training images that keep their labels; those of the others become unknown.
        labelled_seed: see ``labelled_split``.
        indices: int64, the training images in use. The labels of all other images stay unchanged.

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
        check_numbers(above=0, most=1, optional=True, remedy="give a fraction", labelled_fraction=labelled_fraction)
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
        """The training images in use that keep their labels, int64, ascending."""
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
        """The given labels, int8 ``[N, C]`` of 1, 0 and -1 (unknown); ``target`` are the data set's own."""
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
        # drawn at once for all labels, so that the candidates depend only on their number and the seed
        drawn = candidates_from_uniforms((own == 1).astype(np.uint8), self.candidates.rate, generator.random(own.shape))
        return np.where(own < 0, -1, drawn).astype(np.int8)
