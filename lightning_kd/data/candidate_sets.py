"""Candidate sets, several labels per sample of which one is true: the base class, and two random generators."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.seeding import numpy_generator
from lightning_kd.data.candidates import candidates_from_uniforms
from lightning_kd.data.label_noise import CleanLabels, DrawnLabels, at_least_two

__all__ = ["CandidateSets", "PairwiseCandidates", "UniformCandidates", "to_candidates"]


class CandidateSets(DrawnLabels):
    """Gives each training sample a set of candidate labels that includes its true label.

    A subclass implements ``draw``; see ``DrawnLabels`` for the arguments.
    """

    #: whether the clean meta set is drawn only from samples with one candidate
    meta_from_single = False

    @abstractmethod
    def draw(self, clean: CleanLabels, generator: np.random.Generator) -> np.ndarray:
        """Draw the candidates, ``[N, K]`` of 0 and 1, from ``generator``; must not change ``clean``."""

    def given_labels(self, clean: CleanLabels) -> np.ndarray:
        """Uint8 ``[N, K]``: 1 for a candidate, else 0."""
        at_least_two(clean.class_names)
        drawn = np.asarray(self.draw(clean, numpy_generator(self.seed, "candidates")))
        return to_candidates(drawn, clean.target, clean.num_classes, f"candidates of {self}")


def to_candidates(array: np.ndarray, own: np.ndarray, num_classes: int, name: str) -> np.ndarray:
    """Convert candidate sets to uint8 ``[N, K]``, after checks.

    Args:
        array: ``[N, K]`` of 0 and 1.
        own: the true labels, int64 ``[N]``.
        num_classes: ``K``, the number of classes.
        name: name of the array in error messages.

    Raises:
        ValueError: for another shape or value, a sample without candidates, or one whose own label is not a candidate.
    """
    if array.shape != (len(own), num_classes):
        raise ValueError(
            f"{name} must be [{len(own)}, {num_classes}], a row for each sample and a column for each class, got "
            f"{list(array.shape)}: give those of this data set"
        )
    if array.dtype.kind not in "biuf" or not np.isin(array, (0, 1)).all():
        raise ValueError(f"{name} must hold 0 and 1, got {array.dtype} with other values: correct them")
    there = array.astype(np.uint8)
    for bad, what in ((~there.any(1), "no candidate"), (there[range(len(own)), own] == 0, "not its own label")):
        if bad.any():
            raise ValueError(
                f"{name} must have the label of each sample, got {what} for sample {int(bad.argmax())}: add it"
            )
    return there


class UniformCandidates(CandidateSets):
    """Adds each wrong label to the candidates with probability ``q``, independently of the class.

    With ``q=0.5`` and ``reject_full``, all sets that contain the true label, except the full set, are equally likely.

    Args:
        q: probability in [0, 1).
        ensure_ambiguous: give a sample whose only candidate is its true label one random wrong label.
        reject_full: draw again for samples that have all labels as candidates.
        seed: the candidates depend only on the seed and the labels; 0 or more.

    Raises:
        ValueError: for an argument out of its range, and for both options with 2 classes, where no set satisfies both.
    """

    def __init__(self, q: float, ensure_ambiguous: bool = False, reject_full: bool = False, seed: int = 1) -> None:
        check_numbers(least=0, below=1, q=q)
        self.q = float(q)
        self.ensure_ambiguous = ensure_ambiguous
        self.reject_full = reject_full
        super().__init__(seed)

    @property
    def nominal_rate(self) -> float:
        return self.q

    def draw(self, clean: CleanLabels, generator: np.random.Generator) -> np.ndarray:
        target, count = clean.target, clean.num_classes
        if count == 2 and self.ensure_ambiguous and self.reject_full:
            raise ValueError("ensure_ambiguous and reject_full exclude each other with 2 classes: leave one out")
        own = np.eye(count, dtype=np.uint8)[target]
        # drawn at once for all labels, so that the candidates depend only on the labels and the seed
        given = candidates_from_uniforms(own, self.q, generator.random(own.shape))
        while self.reject_full and len(full := np.flatnonzero(given.all(1))):
            given[full] = candidates_from_uniforms(own[full], self.q, generator.random((len(full), count)))
        if self.ensure_ambiguous:
            other = generator.integers(count - 1, size=len(target))
            single = np.flatnonzero(given.sum(1) == 1)
            given[single, (other + (other >= target))[single]] = 1
        return given


class PairwiseCandidates(CandidateSets):
    """Adds the next class (after the last one the first) to the candidates with probability ``q``, and no other label.

    Args:
        q: probability in [0, 1].
        seed: the candidates depend only on the seed and the labels; 0 or more.

    Raises:
        ValueError: for an argument out of its range.
    """

    def __init__(self, q: float, seed: int = 1) -> None:
        check_numbers(least=0, most=1, q=q)
        self.q = float(q)
        super().__init__(seed)

    @property
    def nominal_rate(self) -> float:
        return self.q

    def draw(self, clean: CleanLabels, generator: np.random.Generator) -> np.ndarray:
        target, count = clean.target, clean.num_classes
        given = np.eye(count, dtype=np.uint8)[target]
        chosen = np.flatnonzero(generator.random(len(target)) < self.q)
        given[chosen, (target[chosen] + 1) % count] = 1
        return given
