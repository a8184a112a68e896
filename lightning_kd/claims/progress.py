"""A bar over the runs of a claim, with the time that is left."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

__all__ = ["Progress", "seconds_left"]


class Progress:
    """The bar; entered while the runs go.

    Args:
        title: before the bar.
        settings: the setting of each run that is to be made.
        at_once: how many runs go at the same time.
        guess: seconds of a run, while none is known.
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
        """One run of ``setting`` is done; ``line`` is said of it."""
        self._left.remove(setting)
        self._spent.setdefault(setting, []).append(seconds)
        self._bar.console.print(line, highlight=False, markup=False)
        self._bar.update(self._task, advance=1, left=self._text())

    def _text(self) -> str:
        return told(seconds_left(self._left, self._spent, self._at_once, self._guess))


def seconds_left(left: Sequence[str], spent: dict[str, list[float]], at_once: int, guess: float) -> float:
    """How long the runs of the settings ``left`` will take: each as those of its setting did, or as all did.

    Args:
        left: the setting of each run to come.
        spent: the seconds of those that are done.
        at_once: how many go at the same time.
        guess: seconds of a run, where none is done.
    """
    every = [seconds for of_one in spent.values() for seconds in of_one]
    usual = sum(every) / len(every) if every else guess
    return sum(sum(spent[name]) / len(spent[name]) if name in spent else usual for name in left) / at_once


def told(seconds: float) -> str:
    """The time left in words."""
    if seconds < 90:
        return f"{seconds:.0f} s left"
    return f"{seconds / 60:.0f} min left"
