"""Checks of arguments that several data modules take."""

from __future__ import annotations

from collections.abc import Sequence


def check_at_least(name: str, value: int, least: int) -> None:
    """Raise a ``ValueError`` where ``value`` is below ``least``."""
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}: give a whole number from {least} on")


def check_shares(val_fraction: float, train_fraction: float | None, train_per_class: int | None) -> None:
    """Raise a ``ValueError`` where one is out of its range, or both ways to choose a subset are given."""
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction must be from 0 to below 1, got {val_fraction}: give a share, 0 for none")
    if train_fraction is not None and train_per_class is not None:
        raise ValueError(
            f"train_fraction and train_per_class exclude each other, got {train_fraction} and {train_per_class}: "
            "leave one out"
        )
    if train_fraction is not None and not 0 < train_fraction <= 1:
        raise ValueError(f"train_fraction must be above 0 and at most 1, got {train_fraction}: give a share")
    if train_per_class is not None:
        check_at_least("train_per_class", train_per_class, 1)


def check_statistics(mean: Sequence[float], std: Sequence[float], input_shape: Sequence[int]) -> None:
    """Raise a ``ValueError`` unless there is a mean and a positive deviation for each channel."""
    for name, value in (("mean", mean), ("std", std)):
        if len(value) != input_shape[0]:
            raise ValueError(f"{name} must have {input_shape[0]} values, got {list(value)}: one for each channel")
    if not all(value > 0 for value in std):
        raise ValueError(f"std must be above 0, got {list(std)}: give the deviation of each channel")


def check_class_names(stored: Sequence[str], names: Sequence[str]) -> None:
    """Refuse a checkpoint of other classes, whose numbers would mean something else now.

    Args:
        stored: the names in the checkpoint, in the order of their numbers.
        names: those of the data.

    Raises:
        ValueError: where they differ.
    """
    if list(stored[: len(names)]) == list(names):  # a data set may lack the last ones
        return
    added, gone = [n for n in names if n not in stored], [n for n in stored if n not in names]
    what = "; ".join(
        text
        for text in (
            f"new are {added[:5]}" if added else "",
            f"gone are {gone[:5]}" if gone else "",
            "they stand in another order" if not added and not gone else "",
        )
        if text
    )
    raise ValueError(
        f"the classes of the data are not those of the checkpoint ({what}): class 0 was {stored[0]!r} and so on; give "
        "the data of that run, or start anew"
    )
