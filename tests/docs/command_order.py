"""Whether the commands of a page can be typed in order: what each one needs, an earlier one has made."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.docs.option_check import check, flags_of


class TypedCommands:
    """The commands of a page so far.

    Args:
        files: paths that the reader is assumed to have.
    """

    def __init__(self, files: Sequence[str]) -> None:
        self.files = files
        self.runs: dict[str, dict[str, Any]] = {}
        self.stores: set[str] = set()

    def add(self, words: Sequence[str]) -> None:
        """Add the command ``lightning-kd WORDS``.

        Raises:
            ValueError: if it is not valid, would train over an earlier run, or needs a run or store that none has made.
        """
        before = {*self.runs}
        settings = check(words, self.runs, self.files)
        if words[0] not in ("fit", "active", "teach") or not settings:
            return
        given = dict(flags_of(words[1:]))
        if "print_config" in given:
            return
        made = {*self.runs} - before
        if words[0] == "fit" and not made and not {"overwrite", "ckpt_path"} & {*given}:
            raise ValueError("an earlier command of the page has trained in this folder: give another --run")
        model = settings.get("model", {}).get("init_args", {})
        model = {**model, **{name.removeprefix("model."): given[name] for name in given if name.startswith("model.")}}
        there = {_without_numbers(run) for run in [*before, *self.files]}
        if lacking := [run for run in _matches(r"\bruns/[\w-]+", model) if _without_numbers(run) not in there]:
            raise ValueError(f"no earlier command of the page makes {lacking[0]}")
        if words[0] == "teach":
            self.stores.add(given.get("out") or str(Path(model["teacher_weights"]).with_suffix(".store")))
        elif (store := model.get("teacher_store")) and store not in self.stores:
            raise ValueError(f"no teach of the page makes {store}")


def _without_numbers(run: str) -> str:
    return re.sub(r"\d+", "#", run)  # of commands that differ in numbers alone, one is checked


def _matches(pattern: str, value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield from re.findall(pattern, value)
    elif isinstance(value, dict | list):
        parts: Iterable[Any] = value.values() if isinstance(value, dict) else value
        for part in parts:
            yield from _matches(pattern, part)
