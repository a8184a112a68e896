"""Checks of the numbers that constructors and functions are given. Imports nothing, so that every part can use it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

__all__ = ["check_numbers"]


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
    """Refuse values that are no finite numbers, or out of range: ``check_numbers(above=0, temperature=temperature)``.

    Args:
        named: further arguments, whose names are known only when it runs.
        least: the smallest number allowed.
        above: what the numbers must be above.
        most: the largest number allowed.
        below: what the numbers must be below.
        whole: refuse what is no integer.
        optional: let ``None`` pass.
        remedy: ends the message. Default: to give such a number.
        values: the arguments by their names. Booleans are no numbers.

    Raises:
        ValueError: naming the first argument that is refused, its value and the range.
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
