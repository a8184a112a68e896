"""Seeded stratified choices of samples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def take_per_class(target: np.ndarray, take: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Choose ``take[c]`` samples of each class ``c`` at random.

    For the same generator state a larger ``take`` contains the smaller one.

    Args:
        target: int64 ``[N]``, all below ``len(take)``.
        take: int64 ``[K]``, at most the size of each class.
        generator: where the choice comes from.

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
    """Choose ``fraction`` of the samples, of every class as nearly that share as whole numbers allow.

    The shares are rounded so that the total is right: the classes with the largest remainders get one more, ties by
    lot.

    Args:
        target: int64 ``[N]``, all below ``num_classes``.
        num_classes: the number of classes.
        fraction: between 0 and 1.
        generator: where the choice comes from.
        leave: samples of each class that are never taken (all that it has, where it has fewer).

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
    """The positions in ``target`` to train on: all, so many of each class, or a share of each.

    Args:
        target: int64 ``[N]``, what is left beside the validation samples.
        whole: int64 ``[C]``, how many samples each class has in the full training array.
        generator: where the choice comes from.
        class_names: for messages.
        per_class: so many of each class.
        fraction: this share instead.
        all_if_too_few: take all where a class has too few, rather than raise.
        by_class: whether ``target`` are classes; else all are one group, which messages then do not call a class.

    Raises:
        ValueError: where a class has too few samples, or would be left without.
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
