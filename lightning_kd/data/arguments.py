"""Checks of arguments that several data modules share."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_kd.argument_checks import check_numbers


def check_subset_sizes(val_fraction: float, train_fraction: float | None, train_per_class: int | None) -> None:
    """Raise a ``ValueError`` for a number out of range, or where both sizes of the training subset are given."""
    check_numbers(least=0, below=1, remedy="give a fraction, 0 for none", val_fraction=val_fraction)
    if train_fraction is not None and train_per_class is not None:
        raise ValueError(
            f"train_fraction and train_per_class exclude each other, got {train_fraction} and {train_per_class}: "
            "leave one out"
        )
    check_numbers(above=0, most=1, optional=True, remedy="give a fraction", train_fraction=train_fraction)
    check_numbers(least=1, whole=True, optional=True, train_per_class=train_per_class)


def check_statistics(mean: Sequence[float], std: Sequence[float], input_shape: Sequence[int]) -> None:
    """Raise a ``ValueError`` unless there is a mean and a positive standard deviation for each channel."""
    for name, value in (("mean", mean), ("std", std)):
        if len(value) != input_shape[0]:
            raise ValueError(f"{name} must have {input_shape[0]} values, got {list(value)}: one for each channel")
    for each in mean:
        check_numbers(mean=each)
    for each in std:
        check_numbers(above=0, remedy="give the standard deviation of each channel", std=each)


def names_of(class_names: Sequence[str | int] | None) -> list[str] | None:
    """The ``class_names`` of a user as strings; YAML may have read some as numbers.

    Raises:
        ValueError: for a name that occurs twice, or a string instead of a list.
    """
    if class_names is None:
        return None
    names = [] if isinstance(class_names, str) else [str(name) for name in class_names]
    if isinstance(class_names, str) or len({*names}) < len(names):
        raise ValueError(f"class_names must be a list of different names, got {class_names!r}: give one for each class")
    return names


def check_class_names(stored: Sequence[str], names: Sequence[str]) -> None:
    """Refuse a checkpoint of other classes: its class indices would mean other classes now.

    Args:
        stored: class names in the checkpoint, by class index.
        names: class names of the data.

    Raises:
        ValueError: where they differ. The data may lack the last classes of the checkpoint.
    """
    if list(stored[: len(names)]) == list(names):  # a data set may lack the last ones
        return
    added, gone = [n for n in names if n not in stored], [n for n in stored if n not in names]
    what = "; ".join(
        text
        for text in (
            f"{added[:5]} are new" if added else "",
            f"{gone[:5]} are missing" if gone else "",
            "their order differs" if not added and not gone else "",
        )
        if text
    )
    raise ValueError(
        f"the classes of the data are not those of the checkpoint ({what}; its class 0 was {stored[0]!r}): give the "
        f"data of that run, or class_names={list(stored)} for arrays that lack some of its classes, or start anew "
        "with fit --overwrite"
    )
