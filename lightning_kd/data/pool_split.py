"""The pool before the first query: the class of each sample, and which samples are labelled at the start."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.seeding import numpy_generator
from lightning_kd.data.classification_data import ClassificationDataModule

UNLABELLED = -1


class KnownTargets(NamedTuple):
    """The targets of a data set as indices of the known classes, ``K`` for all other classes.

    Attributes:
        train: int64 ``[N]``, of the training array.
        test: int64, of the test array.
        val: int64, of the array that validation samples are taken from.
        test_indices: int64, ascending, positions of the test samples of known classes.
        val_indices: int64, ascending, positions of the validation samples of known classes.
    """

    train: np.ndarray
    test: np.ndarray
    val: np.ndarray
    test_indices: np.ndarray
    val_indices: np.ndarray


def number_known(source: ClassificationDataModule, known_ids: list[int], num_known: int) -> KnownTargets:
    """The targets of ``source`` as positions of their class in ``known_ids``; ``num_known`` for all other classes.

    Raises:
        ValueError: where no test sample has a known class.
    """
    k = num_known
    internal = np.full(source.num_classes, k)
    internal[known_ids] = np.arange(len(known_ids))
    train = internal[source.train_target.numpy()]
    test = internal[source.test_target.numpy()]
    val = internal[source.val_target.numpy()] if source._val_source == "val" else train
    test_indices = source.test_indices[test[source.test_indices] < k]
    if not len(test_indices):
        raise ValueError("the test set has no sample of the known classes: choose other known_classes")
    val_indices = source.val_indices[val[source.val_indices] < k]
    return KnownTargets(train, test, val, test_indices, val_indices)


class PoolSplit(NamedTuple):
    """The samples that are labelled at the start.

    Attributes:
        universe: int64, positions of all samples of the pool, labelled or not.
        initial: int64, those of them that are labelled.
        label: int64 ``[N]``, the class of each labelled sample, else -1.
    """

    universe: np.ndarray
    initial: np.ndarray
    label: np.ndarray


def label_all(universe: np.ndarray, truth: np.ndarray, unlabelled: int) -> PoolSplit:
    """The split in which ``truth`` ``[N]`` labels all of ``universe``, and ``unlabelled`` further samples follow."""
    label = np.full(len(truth) + unlabelled, UNLABELLED)
    label[universe] = truth[universe]
    added = np.arange(len(truth), len(truth) + unlabelled)
    return PoolSplit(np.concatenate([universe, added]), universe, label)


def label_some(universe: np.ndarray, truth: np.ndarray, initial: np.ndarray) -> PoolSplit:
    """The split in which only the samples ``initial`` are labelled, by ``truth`` ``[N]``."""
    label = np.full(len(truth), UNLABELLED)
    label[initial] = truth[initial]
    return PoolSplit(universe, initial, label)


def check_initial(fraction: float | None, count: int | None, pool: str | None) -> None:
    """Raise a ``ValueError`` unless it is clear how many samples are labelled at the start."""
    check_numbers(above=0, most=1, optional=True, remedy="give a fraction", initial_fraction=fraction)
    check_numbers(least=1, whole=True, optional=True, initial_count=count)
    if pool is None and (fraction is None) == (count is None):
        raise ValueError(
            f"initial_fraction and initial_count: give one of them, got {fraction} and {count}: "
            "it says how many labels there are at the start"
        )
    if pool is not None and not (fraction is None and count is None):
        raise ValueError(
            "initial_fraction and initial_count are for a source without pool (with one, all of source is labelled), "
            f"got pool={pool!r}: leave them out"
        )


def draw_initial(
    universe: np.ndarray,
    truth: np.ndarray,
    num_known: int,
    fraction: float | None,
    count: int | None,
    split_seed: int,
    fake: bool,
) -> np.ndarray:
    """Draw the samples that are labelled at the start, int64, ascending; see ``OpenSetDataModule``.

    Raises:
        ValueError: where their number would be 0, or larger than that of the samples of known classes.
    """
    known = universe[truth[universe] < num_known]
    order = numpy_generator(split_seed, "initial_labels").permutation(known)
    if fake:  # synthetic data is small: two samples of each class
        return np.sort(np.concatenate([order[truth[order] == c][:2] for c in range(num_known)]))
    number = count
    if number is None:
        assert fraction is not None
        number = int(np.floor(fraction * len(known) + 1e-9))
    if not 1 <= number <= len(known):
        raise ValueError(
            f"initial_fraction={fraction}, initial_count={count} give {number} of {len(known)} samples of known "
            f"classes: choose 1 to {len(known)}"
        )
    return np.sort(order[:number])


def checked_budget(budget: int, split: PoolSplit, fake_rounds: int | None) -> int:
    """``budget``, if the pool is large enough; on a synthetic pool lowered to suit ``fake_rounds`` queries.

    Raises:
        ValueError: where it is larger than the pool.
    """
    unlabelled = int((split.label[split.universe] == UNLABELLED).sum())
    if fake_rounds is not None:
        budget = min(budget, max(1, unlabelled // (2 * fake_rounds)))
    if budget > unlabelled:
        raise ValueError(f"budget={budget} is more than the {unlabelled} samples of the pool: lower it")
    return budget


def check_every_class(split: PoolSplit, class_names: list[str]) -> None:
    """Raise a ``ValueError`` where no sample of a known class is labelled at the start."""
    k = len(class_names)
    missing = np.flatnonzero(np.bincount(split.label[split.initial], minlength=k + 1)[:k] == 0)
    if len(missing):
        raise ValueError(
            f"the initial set of {len(split.initial)} samples has none of class {class_names[missing[0]]!r}: "
            "raise initial_fraction or initial_count, or take another split_seed"
        )
