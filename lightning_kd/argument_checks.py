"""Checking what constructors and functions are given. Imports nothing, so that every part can use it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any

__all__ = ["check_numbers", "naming_argument"]


def check_numbers(
    named: Mapping[str, Any] | None = None,
    /,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    whole: bool = False,
    optional: bool = False,
    remedy: str = "",
    **values: Any,
) -> None:
    """Raise for arguments that are not finite numbers in a range: ``check_numbers(above=0, temperature=temperature)``.

    Args:
        named: further arguments by name, for names that are no keywords.
        least: the smallest allowed number. Default: no limit.
        above: numbers must be larger than this. Default: no limit.
        most: the largest allowed number. Default: no limit.
        below: numbers must be smaller than this. Default: no limit.
        whole: allow integers only.
        optional: allow ``None``.
        remedy: end of the message. Default: to give such a number.
        values: the arguments by name. Booleans are not numbers.

    Raises:
        ValueError: naming the first wrong argument, its value and the range.
    """
    for name, value in {**(named or {}), **values}.items():
        if optional and value is None:
            continue
        is_number = isinstance(value, Integral if whole else Real) and not isinstance(value, bool)
        fits = is_number and math.isfinite(value)
        fits = fits and (least is None or value >= least) and (above is None or value > above)
        fits = fits and (most is None or value <= most) and (below is None or value < below)
        if not fits:
            limits = (("at least", least), ("above", above), ("at most", most), ("below", below))
            wanted = " and ".join(f"{words} {limit}" for words, limit in limits if limit is not None)
            if whole and isinstance(value, Real) and not isinstance(value, Integral):
                wanted = "a whole number"
            usual = f"give {'such ' if wanted else ''}a {'whole' if whole else 'finite'} number"
            raise ValueError(f"{name} must be {wanted or 'finite'}, got {value!r}: {remedy or usual}")


@contextmanager
def naming_argument(name: str) -> Iterator[None]:
    """A context in which messages about a wrong value begin with the name of its argument.

    For values that are checked where several arguments arrive: a network's name may be a student's or a teacher's.
    Messages that begin with ``name`` stay as they are.
    """
    try:
        yield
    except (ValueError, FileNotFoundError, PermissionError, ImportError) as error:
        if str(error).startswith(name):
            raise
        kind = next(k for k in (ValueError, FileNotFoundError, PermissionError, ImportError) if isinstance(error, k))
        raise kind(f"{name}: {error}") from error
