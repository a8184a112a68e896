"""Chooses which classes of a data set are known in open-set learning: by number, name, order or at random."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.seeding import numpy_generator


def choose_known_classes(
    names: Sequence[str],
    given: int | list[int | str] | None,
    class_order: str | list[int | str],
    split_seed: int,
    root: str | None = None,
    fake: bool = False,
) -> list[int]:
    """The indices of the known classes, ascending; see ``OpenSetDataModule``.

    Args:
        names: names of all classes of the source.
        given: ``known_classes`` of ``OpenSetDataModule``.
        class_order: of ``OpenSetDataModule``.
        split_seed: of ``OpenSetDataModule``.
        root: folder in which a file named by ``class_order`` is looked for first.
        fake: whether the classes are synthetic. Then the first classes are taken if the file does not name them.

    Raises:
        ValueError: for classes that do not exist or are repeated, and for fewer than 2.
    """
    total = len(names)
    if isinstance(given, list):
        chosen = _named_classes(names, given, class_order)
    else:
        if given is None:
            raise ValueError("known_classes must be given, got None: say how many classes are known, or which")
        check_numbers(least=2, most=total, whole=True, remedy=f"the source has {total} classes", known_classes=given)
        chosen = _ordered_classes(names, given, class_order, split_seed, root, fake)[:given]
    if len(chosen) < 2:
        raise ValueError(f"known_classes must be at least 2, got {len(chosen)}: give two classes or more")
    return sorted(chosen)


def _named_classes(names: Sequence[str], given: list[int | str], class_order: str | list[int | str]) -> list[int]:
    # a file is accepted and ignored: shipped configs name the order file of their data set
    if class_order == "random" or isinstance(class_order, list):
        raise ValueError(f"class_order needs known_classes to be a number, got the list {given}: leave class_order out")
    return _numbers("known_classes", given, names)


def _ordered_classes(
    names: Sequence[str], count: int, class_order: str | list[int | str], split_seed: int, root: str | None, fake: bool
) -> list[int]:
    if class_order == "random":
        order: list[int] = numpy_generator(split_seed, "known_classes").permutation(len(names)).tolist()
        return order
    if class_order == "first":
        return list(range(len(names)))
    if isinstance(class_order, str):
        inside = Path(root or ".") / class_order
        path = inside if inside.is_file() else Path(class_order)
        if fake and not (path.is_file() and {*_read_order(path)} & {*names}):
            return list(range(len(names)))
        class_order = _read_order(path)
    chosen = _numbers("class_order", class_order, names)
    if len(chosen) < count:
        raise ValueError(f"class_order names {len(chosen)} classes, fewer than known_classes={count}: name more")
    return chosen


def _read_order(path: Path) -> list[int | str]:
    try:
        return [*filter(None, map(str.strip, path.read_text(encoding="utf-8-sig").splitlines()))]
    except (OSError, UnicodeDecodeError):
        raise ValueError(
            f"class_order must be 'first', 'random', a list of classes or a text file with one name per line, got "
            f"{str(path)!r}, which is not such a file: correct the name"
        ) from None


def _numbers(argument: str, given: Sequence[int | str], names: Sequence[str]) -> list[int]:
    unknown = [c for c in given if isinstance(c, str) and c not in names]
    if unknown:
        raise ValueError(f"{argument} holds {unknown[0]!r}, which is no class of the source: it has {list(names)[:20]}")
    chosen = [names.index(c) if isinstance(c, str) else c for c in given]
    _check_classes(argument, chosen, len(names))
    return chosen


def _check_classes(name: str, ids: Sequence[int], total: int) -> None:
    if len(set(ids)) < len(ids):
        twice = next(c for c in ids if list(ids).count(c) > 1)
        raise ValueError(f"{name} holds class {twice} more than once: name each class once")
    outside = [c for c in ids if not 0 <= c < total]
    if outside:
        raise ValueError(f"{name} holds {outside[0]}, but the source has classes 0 to {total - 1}: correct it")
