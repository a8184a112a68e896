"""``lightning-kd label``: take a person's answers into a pool."""

from __future__ import annotations

import argparse
import difflib
import shlex
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning_kd.pool.pool_record import UNKNOWN, PoolRecord, alone
from lightning_kd.spreadsheet import as_written, column_name, read_table, without_zeros

__all__ = ["main", "take_answers"]

MOST_SHOWN = 10
MOST_NAMES = 20
COLUMNS = ("index", "path", "score", "loss_weight", "predicted", "label")


def main(args: Sequence[str]) -> None:
    """The command line; raises a ``ValueError`` or ``OSError`` of one message where something is wrong."""
    parser = argparse.ArgumentParser(
        prog="lightning-kd label",
        description="Take answers into the pool of a run: a CSV (separated by commas, semicolons or tabs) with the "
        "columns index and label, such as a query_ROUND.csv that was filled in. A label is a class name or "
        f"{UNKNOWN!r}; an empty one is no answer yet.",
    )
    parser.add_argument("answers", help="the CSV file")
    parser.add_argument("--run", help="the run folder; default: the folder that the file is in")
    parser.add_argument(
        "--correct",
        action="store_true",
        help="let other labels replace earlier answers, and empty ones take them back; pool.json keeps the old ones",
    )
    parser.add_argument(
        "--new_class", action="append", default=[], metavar="NAME", help="a new known class, with labels in the file"
    )
    given = parser.parse_args(args)
    path = Path(given.answers)
    folder = Path(given.run) if given.run is not None else path.parent
    if not (folder / "pool.json").is_file():
        raise FileNotFoundError(f"there is no {folder / 'pool.json'}: name the folder of the run with --run")
    with alone(folder):
        print(take_answers(path, folder, correct=given.correct, new_classes=given.new_class))


def take_answers(path: Path, folder: Path, correct: bool = False, new_classes: Sequence[str] = ()) -> str:
    """Take the answers in the CSV file ``path`` into ``folder/pool.json``: all of them, or none.

    Answers that are there already may come again. Returns a message for the person.

    Args:
        path: the file.
        folder: of the run.
        correct: let other labels replace a person's earlier answers, and empty ones take them back.
        new_classes: names that are known classes from now on; the file must have labels of each.

    Raises:
        ValueError: with everything that is wrong in the file: names that are no known class, samples that were not
            asked for, samples that come twice, answers that contradict earlier ones; and for a new class that is none.
        FileNotFoundError: where a file does not exist.
    """
    record = PoolRecord.load(folder / "pool.json")
    added = _added_classes(record, new_classes)
    classes = [*record.settings.get("classes", []), *added, UNKNOWN]
    find = _Finder(record)
    rows, width, read_as = _read(path)
    seen: dict[int, str | None] = {}  # by position in the record
    repeated = typed = 0
    problems: list[str] = []
    for line, number, cells in rows:
        where = f"line {line}"
        if number > width:
            problems.append(f"{where} has {number} cells, the first line {width}: put a cell with separators in quotes")
            continue
        label = _class_of(cells["label"], classes)
        if not label and not correct:
            continue
        typed += label != cells["label"]
        try:
            index = int(without_zeros(cells["index"]))
        except ValueError:
            problems.append(f"{where}: index {cells['index']!r} is no whole number")
            continue
        if label and label not in classes:
            problems.append(f"{where}: {_no_class(label, classes, 'samples' not in record.settings)}")
        place = find(index, cells.get("path", ""))
        if isinstance(place, str):
            problems.append(f"{where}: {place}")
            continue
        row = record.queries[place]
        if place in seen:
            problems.append(f"{where}: index {index} comes twice")
        elif row["answer"] not in (None, label) and not correct:
            was = f"was answered {row['answer']!r} before, now {label!r}"
            problems.append(f"{where}: index {index} {was} (--correct changes it)")
        elif row["answer"] not in (None, label) and row["by"] != "person":
            problems.append(f"{where}: index {index} was answered {row['answer']!r} by the {row['by']}, not a person")
        seen[place] = label or None
        repeated += bool(label) and row["answer"] == label
    problems += [f"no line is labelled {name!r}, the new class" for name in added if name not in seen.values()]
    if problems:
        more = len(problems) - MOST_SHOWN
        shown = [*problems[:MOST_SHOWN], *([f"and {more} more"] if more > 0 else [])]
        raise ValueError("\n  ".join([f"nothing was taken from {path}, as {len(problems)} things are wrong:", *shown]))
    before = {place: record.queries[place]["answer"] for place in seen}
    if not any(seen.values()) and not any(before.values()):
        raise ValueError(f"{path} holds no answer: fill in the column label with a class name or {UNKNOWN!r}")
    if added:
        record.add_classes(added)
    if correct:
        record.correct_answers({record.queries[k]["index"]: label for k, label in seen.items()}, "person")
    answers = {record.queries[k]["index"]: label for k, label in seen.items() if label is not None}
    record.add_answers(answers, "person")
    record.save()
    text = _told_of_answers(record, seen, before, repeated, classes)
    if typed:
        read_as.append(f"{typed} labels in other letters, or blanks, than the class")
    if read_as:
        text += f"\nread: {'; '.join(read_as)}"
    if added:
        text += (
            f"\n{', '.join(map(repr, added))}: known from now on. The next fit has {len(classes) - 1} classes, and "
            "goes on from no earlier checkpoint"
        )
    if waiting := len(record.pending):
        text += f"\n{waiting} samples still wait for an answer; it may be given later, too"
    return f"{text}\nnext: lightning-kd fit --config {shlex.quote(f'{folder}/config.yaml')} --overwrite"


class _Finder:
    """Which entry of a record a line is for."""

    def __init__(self, record: PoolRecord) -> None:
        self._queries = record.queries
        self._by_path = {as_written(row["path"]): k for k, row in enumerate(record.queries) if row.get("path")}
        self._by_index: dict[int, list[int]] = {}
        for k, row in enumerate(record.queries):
            for index in {row["index"], *row.get("asked_as", [])}:
                self._by_index.setdefault(index, []).append(k)

    def __call__(self, index: int, path: str) -> int | str:
        """Its position, or what is wrong."""
        found = self._by_index.get(index, [])
        if not found:
            return f"index {index} was not asked for"
        if path and self._by_path:
            if (place := self._by_path.get(path)) in found:
                return place
            return f"index {index} is {self._queries[found[0]].get('path')!r}, not {path!r}"
        if len(found) > 1:
            paths = " and ".join(repr(self._queries[k].get("path")) for k in found)
            return f"index {index} was that of {paths}, as files came or went: keep the column path"
        return found[0]


def _added_classes(record: PoolRecord, names: Sequence[str]) -> list[str]:
    """Those of ``names`` that are no classes yet; some may have been added by the same command before.

    Raises:
        ValueError: where one cannot be a new class.
    """
    settings = record.settings
    if names and "samples" in settings:
        raise ValueError(
            f"--new_class is for a pool of your own, and {record.path} is of a data set with classes of its own: name "
            "the known_classes of the data instead"
        )
    added: list[str] = []
    taken = {_plain(name) for name in (*settings.get("classes", []), *settings.get("others", []), UNKNOWN)}
    for name in (name.strip() for name in names):
        if name in settings.get("new_classes", []):
            continue
        if not name or _plain(name) in taken:
            raise ValueError(f"--new_class {name!r} must be a new name, of no class that there is: give another one")
        taken.add(_plain(name))
        added.append(name)
    return added


def _class_of(label: str, classes: Sequence[str]) -> str:
    """The class that somebody meant by ``label``; as it is where there is none."""
    for text in dict.fromkeys((label, without_zeros(label))):
        if text in classes:
            return text
        alike = [name for name in classes if _plain(name) == _plain(text)]
        if len(alike) == 1:
            return alike[0]
    return label


def _no_class(label: str, classes: Sequence[str], may_be_new: bool) -> str:
    shown = ", ".join(classes[:MOST_NAMES]) + (f" and {len(classes) - MOST_NAMES} more" * (len(classes) > MOST_NAMES))
    names = {_plain(name): name for name in classes}
    near = difflib.get_close_matches(_plain(label), names, n=1)
    hint = f": is it a new one, --new_class {shlex.quote(label)}?" if may_be_new else ""
    if near:
        hint = f": did you mean {names[near[0]]!r}?"
    return f"{label!r} is none of {shown}{hint}"


def _plain(name: str) -> str:
    return " ".join(unicodedata.normalize("NFC", as_written(name)).casefold().split())


def _told_of_answers(
    record: PoolRecord,
    seen: Mapping[int, str | None],
    before: Mapping[int, str | None],
    repeated: int,
    classes: Sequence[str],
) -> str:
    """What came in, by class."""
    count = Counter(label for label in seen.values() if label is not None)
    changed = sum(bool(seen[index]) and before[index] not in (None, seen[index]) for index in seen)
    back = sum(seen[index] is None and before[index] is not None for index in seen)
    total = sum(count.values())
    again = f", {repeated} of them known before" if repeated else ""
    text = f"{total} answers, {count[UNKNOWN]} of them {UNKNOWN}{again}; {total - repeated - changed} new"
    text += f", {changed} changed" if changed else ""
    text += f", {back} taken back" if back else ""
    shown = ", ".join(f"{name} {count[name]}" for name in classes if count[name])
    return f"{text} in {record.path}\nby class: {shown or 'none'}; open: {len(record.pending)}"


def _read(path: Path) -> tuple[list[tuple[int, int, dict[str, str]]], int, list[str]]:
    """Line number, number of cells and cells of each row, with the columns ``index`` and ``label``; how many columns
    there are; and what is unusual in the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: name the CSV file with the answers")
    table = read_table(path)
    (_, header), *rows = table.rows or [(0, [])]
    names = [column_name(cell) for cell in header]
    missing = [name for name in ("index", "label") if name not in names]
    if missing:
        raise ValueError(f"{path} has no column {missing[0]!r}, got {header}: give index and label")
    if twice := [name for name in ("index", "path", "label") if names.count(name) > 1]:
        raise ValueError(f"{path} names the column {twice[0]!r} twice in its first line: rename or remove one")
    others = [cell for cell, name in zip(header, names, strict=True) if cell and name not in COLUMNS]
    form = [*table.form, *([f"columns not looked at: {', '.join(others)}"] if others else [])]
    padded = ((line, len(cells), [*cells, *[""] * len(names)]) for line, cells in rows)
    return [(line, count, dict(zip(names, cells, strict=False))) for line, count, cells in padded], len(names), form
