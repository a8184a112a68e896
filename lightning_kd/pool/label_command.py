"""``lightning-kd label``: take a person's answers into a pool."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lightning_kd.pool.pool_record import UNKNOWN, PoolRecord, alone
from lightning_kd.spreadsheet import column_name, read_rows

__all__ = ["main", "take_answers"]

MOST_SHOWN = 10


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
    given = parser.parse_args(args)
    path = Path(given.answers)
    folder = Path(given.run) if given.run is not None else path.parent
    if not (folder / "pool.json").is_file():
        raise FileNotFoundError(f"there is no {folder / 'pool.json'}: name the folder of the run with --run")
    with alone(folder):
        print(take_answers(path, folder))


def take_answers(path: Path, folder: Path) -> str:
    """Take the answers in the CSV file ``path`` into ``folder/pool.json``: all of them, or none.

    Answers that are there already may come again. Returns a message for the person.

    Raises:
        ValueError: with everything that is wrong in the file: names that are no known class, samples that were not
            asked for, samples that come twice, answers that contradict earlier ones.
        FileNotFoundError: where a file does not exist.
    """
    record = PoolRecord.load(folder / "pool.json")
    classes = [*record.settings.get("classes", []), UNKNOWN]
    asked = {row["index"]: row for row in record.queries}
    answers: dict[int, str] = {}
    repeated = 0
    problems: list[str] = []
    for line, cells in _read(path):
        label = cells["label"]
        if not label:
            continue
        if label not in classes:  # as somebody typed it
            alike = [name for name in classes if name.casefold() == label.casefold()]
            label = alike[0] if len(alike) == 1 else label
        where = f"line {line}"
        try:
            index = int(cells["index"])
        except ValueError:
            problems.append(f"{where}: index {cells['index']!r} is no whole number")
            continue
        row = asked.get(index)
        if label not in classes:
            problems.append(f"{where}: {label!r} is none of {', '.join(classes)}")
        if index in answers:
            problems.append(f"{where}: index {index} comes twice")
        elif row is None:
            problems.append(f"{where}: index {index} was not asked for")
        elif cells.get("path") and row.get("path") and cells["path"] != row["path"]:
            problems.append(f"{where}: index {index} is {row['path']!r}, not {cells['path']!r}")
        elif row["answer"] is not None and row["answer"] != label:
            problems.append(f"{where}: index {index} was answered {row['answer']!r} before, now {label!r}")
        answers[index] = label
        repeated += row is not None and row["answer"] == label
    if problems:
        more = len(problems) - MOST_SHOWN
        shown = [*problems[:MOST_SHOWN], *([f"and {more} more"] if more > 0 else [])]
        raise ValueError("\n  ".join([f"nothing was taken from {path}, as {len(problems)} things are wrong:", *shown]))
    if not answers:
        raise ValueError(f"{path} holds no answer: fill in the column label with a class name or {UNKNOWN!r}")
    record.add_answers(answers, "person")
    record.save()
    taken = len(answers) - repeated
    unknown = sum(label == UNKNOWN for label in answers.values())
    again = f", {repeated} of them known before" if repeated else ""
    text = f"{len(answers)} answers, {unknown} of them {UNKNOWN}{again}; {taken} new in {record.path}"
    waiting = len(record.pending)
    if waiting:
        return f"{text}\n{waiting} samples still wait for an answer"
    return f"{text}\nnext: lightning-kd fit --config {folder}/config.yaml --overwrite"


def _read(path: Path) -> list[tuple[int, dict[str, str]]]:
    """Line number and cells of each row, with the columns ``index`` and ``label``."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: name the CSV file with the answers")
    (_, header), *rows = read_rows(path) or [(0, [])]
    names = [column_name(cell) for cell in header]
    missing = [name for name in ("index", "label") if name not in names]
    if missing:
        raise ValueError(f"{path} has no column {missing[0]!r}, got {header}: give index and label")
    return [(line, dict(zip(names, [*cells, *[""] * len(names)], strict=False))) for line, cells in rows]
