"""Draws stratified subsets of samples from a random generator."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def take_per_class(target: np.ndarray, take: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Choose ``take[c]`` samples of each class ``c`` at random.

    With the same generator state, the choice for a larger ``take`` contains that for a smaller one.

    Args:
        target: int64 ``[N]``, class indices below ``len(take)``.
        take: int64 ``[K]``, at most the number of samples of each class.
        generator: source of the random numbers.

    Returns:
        int64 positions in ``target``, ascending.
    """
    order = generator.permutation(len(target))
    order = order[np.argsort(target[order], kind="stable")]
    classes = target[order]
    place = np.arange(len(order)) - np.searchsorted(classes, classes)  # 0, 1, 2, ... within each class
    return np.sort(order[place < take[classes]])


def take_fraction(
    target: np.ndarray, num_classes: int, fraction: float, generator: np.random.Generator, leave: int = 0
) -> np.ndarray:
    """Choose ``fraction`` of the samples at random, stratified by class.

    The number of each class is rounded such that the total is right: the classes with the largest remainders get one
    more, ties broken at random.

    Args:
        target: int64 ``[N]``, class indices below ``num_classes``.
        num_classes: number of classes.
        fraction: from 0 to 1.
        generator: source of the random numbers.
        leave: number of samples of each class that are never taken (all, where a class has fewer).

    Returns:
        int64 positions in ``target``, ascending.
    """
    count = np.bincount(target, minlength=num_classes)
    most = np.maximum(count - leave, 0)
    exact = count * fraction
    take = np.minimum(np.floor(exact + 1e-9).astype(np.int64), most)
    by_remainder = np.lexsort((generator.random(num_classes), take - exact))
    room = by_remainder[take[by_remainder] < most[by_remainder]]
    take[room[: max(round(exact.sum()) - take.sum(), 0)]] += 1
    return take_per_class(target, take, generator)


def without(count: int, taken: np.ndarray) -> np.ndarray:
    """The positions 0 to ``count - 1`` that are not in ``taken``, ascending."""
    return np.setdiff1d(np.arange(count), taken, assume_unique=True)


def take_training_samples(
    target: np.ndarray,
    whole: np.ndarray,
    generator: np.random.Generator,
    class_names: Sequence[str],
    *,
    per_class: int | None = None,
    fraction: float | None = None,
    all_if_too_few: bool = False,
    by_class: bool = True,
) -> np.ndarray:
    """The positions in ``target`` to train on: all, a number of each class, or a fraction of each class.

    Args:
        target: int64 ``[N]``, classes of the samples that are not used for validation.
        whole: int64 ``[C]``, number of samples of each class in the full training array.
        generator: source of the random numbers.
        class_names: for messages.
        per_class: number of samples of each class. Default: no limit.
        fraction: fraction of each class, instead of a number. Default: all.
        all_if_too_few: take all samples instead of raising an error where a class has too few.
        by_class: whether ``target`` holds classes; else all samples are one group, and messages do not name a class.

    Returns:
        int64 positions, ascending.

    Raises:
        ValueError: where a class has too few samples, or would have none.
    """
    classes = len(whole)
    count = np.bincount(target, minlength=classes)
    wanted = np.where(whole > 0, per_class or 1, 0)
    if (count < wanted).any():
        if all_if_too_few:
            return np.arange(len(target))
        c = int((count < wanted).argmax())
        raise ValueError(
            f"train_per_class={per_class} is more than the {count[c]} samples of class {c} "
            f"({class_names[c]!r}): lower it, or val_fraction"
        )
    if per_class is not None:
        return take_per_class(target, wanted, generator)
    if fraction is None:
        return np.arange(len(target))
    chosen = take_fraction(target, classes, fraction, generator)
    absent = (np.bincount(target[chosen], minlength=classes) == 0) & (whole > 0)
    if absent.any():
        if all_if_too_few:
            return np.arange(len(target))
        c = int(absent.argmax())
        if not by_class:
            raise ValueError(f"train_fraction={fraction} of {len(target)} samples leaves none: raise it")
        raise ValueError(
            f"train_fraction={fraction} leaves class {c} ({class_names[c]!r}) without a sample: raise it, or use "
            "train_per_class"
        )
    return chosen
