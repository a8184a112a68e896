"""``lightning-kd label``: add a person's answers to the record of a pool."""

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
    """Run the command with ``args``; a wrong input raises a ``ValueError`` or ``OSError`` with one message."""
    parser = argparse.ArgumentParser(
        prog="lightning-kd label",
        description="Add answers to the pool of a run, from a CSV (separated by commas, semicolons or tabs) with the "
        "columns index and label, such as a query_ROUND.csv that was filled in. A label is a class name or "
        f"{UNKNOWN!r}; an empty one is no answer yet.",
    )
    parser.add_argument("answers", help="the CSV file")
    parser.add_argument("--run", help="the run folder; default: the folder that the file is in")
    parser.add_argument(
        "--correct",
        action="store_true",
        help="replace earlier answers by the labels in the file, and remove those whose label is empty; pool.json "
        "keeps the old ones",
    )
    parser.add_argument(
        "--new_class", action="append", default=[], metavar="NAME", help="a new known class, with labels in the file"
    )
    given = parser.parse_args(args)
    path = Path(given.answers)
    folder = Path(given.run) if given.run is not None else path.parent
    if not path.is_file():
        raise FileNotFoundError(f"answers {str(path)!r} is no file: name the CSV file with the answers")
    if not (folder / "pool.json").is_file():
        raise FileNotFoundError(f"there is no {folder / 'pool.json'}: name the folder of the run with --run")
    with alone(folder):
        print(take_answers(path, folder, correct=given.correct, new_classes=given.new_class))


def take_answers(path: Path, folder: Path, correct: bool = False, new_classes: Sequence[str] = ()) -> str:
    """Add the answers in the CSV file ``path`` to ``folder/pool.json``: all of them, or none.

    Answers that are recorded already may be in the file again.

    Args:
        path: the CSV file.
        folder: the run folder.
        correct: replace a person's earlier answers by other labels of the file, and remove those whose label is empty.
        new_classes: names that become known classes; the file must have labels of each.

    Returns:
        A message for the person: what was added, what is missing, and the next command.

    Raises:
        ValueError: with a list of everything wrong in the file: names that are no known class, samples that were not
            queried, samples that come twice, answers that contradict earlier ones; also for a name in ``new_classes``
            that cannot be a new class.
        FileNotFoundError: if a file does not exist.
    """
    record = PoolRecord.load(folder / "pool.json")
    added = _added_classes(record, new_classes)
    classes = [*record.settings.get("classes", []), *added, UNKNOWN]
    find = _Finder(record)
    rows, width, read_as = _read(path)
    seen: dict[int, str | None] = {}  # label by position in record.queries
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
    text = _summary(record, seen, before, repeated, classes)
    if typed:
        read_as.append(f"{typed} labels spelled with other case or spaces than the class")
    if read_as:
        text += f"\nread: {'; '.join(read_as)}"
    if added:
        text += (
            f"\n{', '.join(map(repr, added))}: known from now on. The next fit has {len(classes) - 1} classes, so it "
            "cannot resume from an earlier checkpoint"
        )
    if waiting := len(record.pending):
        text += f"\n{waiting} samples still wait for an answer, which may be given later"
    return f"{text}\nnext: lightning-kd fit --config {shlex.quote(f'{folder}/config.yaml')} --overwrite"


class _Finder:
    """Finds the entry of a record that a line of the CSV belongs to."""

    def __init__(self, record: PoolRecord) -> None:
        self._queries = record.queries
        self._by_path = {as_written(row["path"]): k for k, row in enumerate(record.queries) if row.get("path")}
        self._by_index: dict[int, list[int]] = {}
        for k, row in enumerate(record.queries):
            for index in {row["index"], *row.get("asked_as", [])}:
                self._by_index.setdefault(index, []).append(k)

    def __call__(self, index: int, path: str) -> int | str:
        """The position of the entry in ``record.queries``, or a message that says what is wrong."""
        found = self._by_index.get(index, [])
        if not found:
            return f"index {index} was not queried"
        if path and self._by_path:
            if (place := self._by_path.get(path)) in found:
                return place
            return f"index {index} is {self._queries[found[0]].get('path')!r}, not {path!r}"
        if len(found) > 1:
            paths = " and ".join(repr(self._queries[k].get("path")) for k in found)
            return f"index {index} was that of {paths}, as files were added or removed: keep the column path"
        return found[0]


def _added_classes(record: PoolRecord, names: Sequence[str]) -> list[str]:
    """Those of ``names`` that are not known classes yet; names that an earlier command added are left out.

    Raises:
        ValueError: if one cannot be a new class.
    """
    settings = record.settings
    if names and "samples" in settings:
        raise ValueError(
            f"--new_class is for a pool of your own images, and {record.path} has the classes of a data set: name "
            "the known_classes of the data instead"
        )
    added: list[str] = []
    taken = {_plain(name) for name in (*settings.get("classes", []), *settings.get("others", []), UNKNOWN)}
    for name in (name.strip() for name in names):
        if name in settings.get("new_classes", []):
            continue
        if not name or _plain(name) in taken:
            raise ValueError(f"--new_class {name!r} must be a new name, got that of a class: give another one")
        taken.add(_plain(name))
        added.append(name)
    return added


def _class_of(label: str, classes: Sequence[str]) -> str:
    """The class whose name equals ``label`` up to case, spaces and a trailing ``.0``; ``label`` if none does."""
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


def _summary(
    record: PoolRecord,
    seen: Mapping[int, str | None],
    before: Mapping[int, str | None],
    repeated: int,
    classes: Sequence[str],
) -> str:
    """The lines that say how many answers were added, in all and of each class."""
    count = Counter(label for label in seen.values() if label is not None)
    changed = sum(bool(seen[index]) and before[index] not in (None, seen[index]) for index in seen)
    removed = sum(seen[index] is None and before[index] is not None for index in seen)
    total = sum(count.values())
    again = f", {repeated} of them known before" if repeated else ""
    text = f"{total} answers, {count[UNKNOWN]} of them {UNKNOWN}{again}; {total - repeated - changed} new"
    text += f", {changed} changed" if changed else ""
    text += f", {removed} removed" if removed else ""
    shown = ", ".join(f"{name} {count[name]}" for name in classes if count[name])
    return f"{text} in {record.path}\nby class: {shown or 'none'}; open: {len(record.pending)}"


def _read(path: Path) -> tuple[list[tuple[int, int, dict[str, str]]], int, list[str]]:
    """Read the CSV.

    Returns:
        ``(rows, width, form)``: line number, number of cells and cells by column name of each row; the number of
        columns; and what is unusual in the file's form.
    """
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
