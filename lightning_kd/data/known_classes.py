"""Which classes of a data set are known, by number, by name, in an order or by chance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from lightning_kd.core.seeding import numpy_generator


def choose_known_classes(
    names: Sequence[str],
    given: int | list[int | str] | None,
    class_order: Literal["first", "random"] | list[int],
    split_seed: int,
) -> list[int]:
    """The numbers of the known classes among those of ``names``, ascending; see ``OpenSetDataModule``.

    Raises:
        ValueError: for classes that do not exist or come twice, and for fewer than 2.
    """
    total = len(names)
    if isinstance(given, list):
        chosen = _named_classes(names, given, class_order)
    else:
        if given is None:
            raise ValueError("known_classes must be given, got None: say how many classes are known, or which")
        if given > total:
            raise ValueError(f"known_classes must be at most the {total} classes of the source, got {given}")
        chosen = _ordered_classes(total, given, class_order, split_seed)[: max(given, 0)]
    if len(chosen) < 2:
        raise ValueError(f"known_classes must be at least 2, got {len(chosen)}: one class leaves nothing to tell")
    return sorted(chosen)


def _named_classes(
    names: Sequence[str], given: list[int | str], class_order: Literal["first", "random"] | list[int]
) -> list[int]:
    if class_order != "first":
        raise ValueError(
            f"class_order goes with a number of known_classes, got the list {given} too: leave class_order out"
        )
    unheard = [c for c in given if isinstance(c, str) and c not in names]
    if unheard:
        raise ValueError(f"known_classes holds {unheard[0]!r}, which is no class of the source: it has {names}")
    chosen = [names.index(c) if isinstance(c, str) else c for c in given]
    _check_classes("known_classes", chosen, len(names))
    return chosen


def _ordered_classes(
    total: int, count: int, class_order: Literal["first", "random"] | list[int], split_seed: int
) -> list[int]:
    if isinstance(class_order, list):
        _check_classes("class_order", class_order, total)
        if len(class_order) < count:
            raise ValueError(f"class_order names {len(class_order)} classes, known_classes={count} needs as many")
        return class_order
    if class_order == "random":
        order: list[int] = numpy_generator(split_seed, "known_classes").permutation(total).tolist()
        return order
    if class_order == "first":
        return list(range(total))
    raise ValueError(f"class_order must be 'first', 'random' or a list, got {class_order!r}")


def _check_classes(name: str, ids: Sequence[int], total: int) -> None:
    if len(set(ids)) < len(ids):
        twice = next(c for c in ids if list(ids).count(c) > 1)
        raise ValueError(f"{name} holds class {twice} more than once: name each class once")
    outside = [c for c in ids if not 0 <= c < total]
    if outside:
        raise ValueError(f"{name} holds {outside[0]}, but the source has classes 0 to {total - 1}: correct it")
