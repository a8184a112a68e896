"""A progress bar over the runs of a claim, with the time left."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

__all__ = ["Progress", "seconds_left"]


class Progress:
    """The progress bar, a context manager.

    Args:
        title: text before the bar.
        settings: the setting of each run to be made.
        at_once: number of runs at the same time.
        guess: assumed seconds of a run, until one has ended.
    """

    def __init__(self, title: str, settings: Sequence[str], at_once: int, guess: float) -> None:
        self._left, self._at_once, self._guess = list(settings), at_once, guess
        self._spent: dict[str, list[float]] = {}
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}"),
        )
        self._bar = Bar(*columns, console=Console(file=sys.stderr))
        self._task = self._bar.add_task(title, total=len(settings), left=self._text())

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def ended(self, setting: str, seconds: float, line: str) -> None:
        """Record that a run of ``setting`` has ended after ``seconds``, and print ``line``."""
        self._left.remove(setting)
        self._spent.setdefault(setting, []).append(seconds)
        self._bar.console.print(line, highlight=False, markup=False)
        self._bar.update(self._task, advance=1, left=self._text())

    def _text(self) -> str:
        return in_words(seconds_left(self._left, self._spent, self._at_once, self._guess))


def seconds_left(left: Sequence[str], spent: dict[str, list[float]], at_once: int, guess: float) -> float:
    """The expected seconds until all runs have ended.

    A run is expected to take the mean time of its setting's runs, or of all runs if its setting has none yet.

    Args:
        left: the setting of each run that has not ended.
        spent: for each setting the seconds of its runs that have ended.
        at_once: number of runs at the same time.
        guess: assumed seconds of a run if none has ended.
    """
    every = [seconds for of_one in spent.values() for seconds in of_one]
    usual = sum(every) / len(every) if every else guess
    return sum(sum(spent[name]) / len(spent[name]) if name in spent else usual for name in left) / at_once


def in_words(seconds: float) -> str:
    """The time left in words."""
    if seconds < 90:
        return f"{seconds:.0f} s left"
    return f"{seconds / 60:.0f} min left"
