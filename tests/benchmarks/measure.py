"""Timing of variants that take turns, and the tables they are printed in."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch


@dataclass(frozen=True)
class Settings:
    """How long to measure: ``rounds`` in which every variant has one turn, and shorter turns with ``quick``."""

    rounds: int = 5
    quick: bool = False

    def size(self, full: int, quick: int) -> int:
        """The length of a turn."""
        return quick if self.quick else full


@dataclass(frozen=True)
class Variant:
    """One way to do the work of a bench.

    Args:
        name: its row in the table.
        turn: does the work once and returns the seconds of one unit (a step, an image).
        target: what it should reach against the first variant, as printed.
    """

    name: str
    turn: Callable[[], float]
    target: str = ""


def clock_name() -> str:
    """Which time is taken: ``"processor"`` or ``"wall"``.

    With one thread the time that the process computed: on an idle machine that is the time that passed, and where other
    programs share the cores it can still be compared. With several threads, or a GPU, the time that passed.
    """
    return "processor" if torch.get_num_threads() == 1 and not torch.cuda.is_available() else "wall"


def now() -> float:
    """The time in seconds, taken once a GPU has done its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.process_time() if clock_name() == "processor" else time.perf_counter()


class Clock:
    """The ``seconds`` that a block takes."""

    def __enter__(self) -> Clock:
        self.start = now()
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds = now() - self.start


def measure(variants: Sequence[Variant], rounds: int) -> list[list[float]]:
    """The seconds a unit of each variant in each round, after a turn of each that does not count.

    All variants have their turn in a round (A B C A B C ...), so that other work of the machine slows all alike.
    """
    for variant in variants:
        variant.turn()
    times: list[list[float]] = [[] for _ in variants]
    for _ in range(rounds):
        for variant, taken in zip(variants, times, strict=True):
            taken.append(variant.turn())
    return times


def compare(title: str, variants: Sequence[Variant], rounds: int, *, show: str = "ms", extra: bool = False) -> None:
    """Measure and print one table; the first variant is what the others are compared with.

    Args:
        title: what one unit is.
        variants: at least one.
        rounds: how often each has its turn.
        show: ``"ms"`` and ``"us"`` a unit, or ``"1/s"``, units a second.
        extra: print how many milliseconds a unit takes more than in the first variant instead of how many times
            faster it is.
    """
    times = measure(variants, rounds)
    base = times[0]
    scale = {"ms": 1e3, "us": 1e6}.get(show)
    heading = "over the first, ms" if extra else "times as fast"
    rows = [(f"{title}, {rounds} rounds", f"{show}, median (best)", f"{heading} (of best)", "target")]
    for variant, taken in zip(variants, times, strict=True):
        middle, best = ((f"{t * scale:,.1f}" if scale else f"{1 / t:,.0f}") for t in (median(taken), min(taken)))
        if extra:
            paired = median(t - b for t, b in zip(taken, base, strict=True)) * 1e3
            minima = (min(taken) - min(base)) * 1e3
        else:
            paired = median(b / t for t, b in zip(taken, base, strict=True))
            minima = min(base) / min(taken)
        against = "" if variant is variants[0] else f"{paired:.2f} ({minima:.2f})"
        rows.append((variant.name, f"{middle} ({best})", against, variant.target))
    widths = [max(len(row[k]) for row in rows) for k in range(4)]
    rows.insert(1, tuple("-" * width for width in widths))  # type: ignore[arg-type]
    for name, *others in rows:
        cells = [name.ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        print("  ".join(cells).rstrip())
    print(flush=True)
