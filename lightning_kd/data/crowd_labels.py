"""Labels by several annotators, few for each sample: the base class, and simulated annotators."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.annotations import check_annotations
from lightning_kd.core.seeding import numpy_generator
from lightning_kd.data.label_noise import CleanLabels, DrawnLabels, at_least_two
from lightning_kd.data.splits import take_per_class

__all__ = ["CrowdLabels", "SimulatedCrowd", "keep_some"]


class CrowdLabels(DrawnLabels):
    """Gives the training samples labels by several annotators.

    A subclass implements ``draw``; see also ``DrawnLabels``.

    Args:
        imbalance: train on a subset with unequal class sizes: the first class has this many times the samples of the
            last, and the sizes in between form a geometric series. 1 keeps all samples.
        seed: fixes the annotations and that subset; 0 or more.

    Raises:
        ValueError: for an argument out of its range.
    """

    def __init__(self, imbalance: float = 1.0, seed: int = 0) -> None:
        check_numbers(least=1, imbalance=imbalance)
        self.imbalance = float(imbalance)
        self._names: list[str] = []
        super().__init__(seed)

    @abstractmethod
    def draw(self, clean: CleanLabels, generator: np.random.Generator) -> np.ndarray:
        """Draw the class that each annotator gave to each sample, integers ``[N, R]``, -1 for none."""

    def annotator_names(self, count: int) -> list[str]:
        """A name for each of ``count`` annotators: those in the file, else ``"0"``, ``"1"``, ..."""
        return self._names if len(self._names) == count else [str(r) for r in range(count)]

    def keep(self, target: np.ndarray, indices: np.ndarray, num_classes: int) -> np.ndarray:
        """The subset of the samples ``indices`` that ``imbalance`` asks for, int64, ascending."""
        if self.imbalance == 1:
            return indices
        there = np.bincount(target[indices], minlength=num_classes)
        weight = self.imbalance ** (-np.arange(num_classes) / max(1, num_classes - 1))
        size = np.maximum(1, np.round(weight * (there / weight).min()).astype(np.int64))
        generator = numpy_generator(self.seed, "annotation_imbalance")
        return indices[take_per_class(target[indices], np.minimum(size, there), generator)]

    def given_labels(self, clean: CleanLabels) -> np.ndarray:
        """The annotations, int16 ``[N, R]``, -1 for none."""
        at_least_two(clean.class_names)
        given = np.asarray(self.draw(clean, numpy_generator(self.seed, "annotations")))
        count = len(clean.target)
        if given.ndim != 2 or len(given) != count or not given.shape[1] or given.dtype.kind not in "iu":
            raise ValueError(
                f"annotations of {self} must be integers [{count}, R], a row for each sample and a column for each "
                f"annotator, got {given.dtype} {list(given.shape)}: give those of this data set"
            )
        signed = given.astype(np.int64) if given.dtype.kind == "u" else given
        try:
            return check_annotations(signed, clean.num_classes).numpy().astype(np.int16, copy=False)
        except ValueError as error:
            raise ValueError(f"{self}: {error}") from None


class SimulatedCrowd(CrowdLabels):
    """Simulates annotators, each with an own probability of the true label; otherwise they give a random wrong one.

    Args:
        annotators: number of annotators ``R``.
        reliability: probability that an annotator is right: one for all, or the smallest and the largest, between which
            each annotator's is drawn uniformly.
        per_item: number of annotators, chosen at random, that label each sample.
        imbalance: see ``CrowdLabels``.
        seed: the annotations depend only on the seed and the labels; 0 or more.

    Raises:
        ValueError: for an argument out of its range.

    Source: the protocol for unequal, sparse crowds with 20 annotators from 0.3 to 0.9, and 1 to 3 labels a sample.
    """

    def __init__(
        self,
        annotators: int = 20,
        reliability: float | tuple[float, float] = (0.3, 0.9),
        per_item: int = 2,
        imbalance: float = 1.0,
        seed: int = 0,
    ) -> None:
        check_numbers(least=1, whole=True, annotators=annotators)
        check_numbers(least=1, most=annotators, whole=True, per_item=per_item)
        limits = tuple(reliability) if isinstance(reliability, list | tuple) else (reliability, reliability)
        if len(limits) != 2:
            raise ValueError(f"reliability must be a number, or a minimum and a maximum, got {reliability!r}: give two")
        for value in limits:
            check_numbers(least=0, most=1, reliability=value)
        if limits[0] > limits[1]:
            raise ValueError(f"reliability must be a minimum and a maximum, got {reliability!r}: swap them")
        self.annotators = annotators
        self.reliability = (float(limits[0]), float(limits[1]))
        self.per_item = per_item
        super().__init__(imbalance, seed)

    def draw(self, clean: CleanLabels, generator: np.random.Generator) -> np.ndarray:
        shape, own = (len(clean.target), self.annotators), clean.target[:, None]
        right = generator.random(shape) < generator.uniform(*self.reliability, size=self.annotators)
        other = generator.integers(clean.num_classes - 1, size=shape)
        given = np.where(right, own, other + (other >= own))
        return keep_some(given, self.per_item, generator)


def keep_some(annotations: np.ndarray, per_item: int, generator: np.random.Generator) -> np.ndarray:
    """Keep ``per_item`` random annotations of each sample (all, where there are no more) and set the others to -1."""
    drawn = np.where(annotations >= 0, generator.random(annotations.shape), 2.0)
    chosen = drawn.argsort(1, kind="stable")[:, :per_item]
    given = np.full_like(annotations, -1)
    np.put_along_axis(given, chosen, np.take_along_axis(annotations, chosen, 1), 1)
    return given
