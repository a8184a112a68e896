"""Reads tables that list image files and their labels, for multi-label data."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lightning_kd.spreadsheet import column_name, read_rows

__all__ = ["LabelTable", "read_label_table"]

FILE_COLUMNS = ("file", "path", "image", "filename", "file_name")
LABEL_COLUMNS = ("labels", "label", "tags", "classes")
SPLITS = ("train", "val", "test")
VALUES = {"0": 0, "1": 1, "": -1}


class LabelTable(NamedTuple):
    """The content of a table of image files and labels.

    Attributes:
        files: image files as they are written in the table.
        lines: number of the line of each file.
        labels: int8 ``[N, C]`` of 1, 0 and -1 (unknown).
        class_names: a name for each column of ``labels``.
        splits: ``"train"``, ``"val"`` or ``"test"`` for each file; ``None`` where the table has no splits.
    """

    files: list[str]
    lines: list[int]
    labels: np.ndarray
    class_names: list[str]
    splits: list[str] | None


def read_label_table(path: Path, class_names: Sequence[str] | None = None) -> LabelTable:
    """Read a ``.csv`` with a header; see ``MultiLabelFolderDataModule`` for its columns.

    Args:
        path: the ``.csv`` file.
        class_names: the classes, in this order. Default: the columns of labels, or all names that occur, sorted.

    Raises:
        FileNotFoundError, PermissionError: where the file does not exist, or may not be read.
        ValueError: naming file and line, for any other fault.
    """
    rows = read_rows(path, "table")
    where = str(path)
    if len(rows) < 2:
        raise ValueError(f"{where!r} must have a header and a line for each image, got {len(rows)} lines: add them")
    (_, header), rows = rows[0], rows[1:]
    for number, cells in rows:
        if len(cells) != len(header):
            raise ValueError(f"{where!r}, line {number}: {len(cells)} cells, the header has {len(header)}: correct it")
    plain = [column_name(cell) for cell in header]
    if twice := [name for name in header if header.count(name) > 1]:
        raise ValueError(f"{where!r}, line 1, names the column {twice[0]!r} twice: rename or remove one")
    file = next((plain.index(name) for name in FILE_COLUMNS if name in plain), None)
    if file is None:
        raise ValueError(f"{where!r}, line 1, must have a column {', '.join(FILE_COLUMNS)}, got {header}: name it so")
    split = plain.index("split") if "split" in plain else None
    rest = [k for k in range(len(header)) if k not in (file, split)]
    if len(rest) == 1 and plain[rest[0]] in LABEL_COLUMNS:
        names, labels = _joined(where, [(number, cells[rest[0]]) for number, cells in rows], class_names)
    else:
        names, labels = _columns(where, header, rest, rows, class_names)
    splits = None
    if split is not None:
        splits = [cells[split].lower() for _, cells in rows]
        for (number, _), name in zip(rows, splits, strict=True):
            if name not in SPLITS:
                raise ValueError(
                    f"{where!r}, line {number}: split {name!r} must be one of {', '.join(SPLITS)}: correct it"
                )
    return LabelTable([cells[file] for _, cells in rows], [number for number, _ in rows], labels, names, splits)


def _joined(
    where: str, cells: list[tuple[int, str]], class_names: Sequence[str] | None
) -> tuple[list[str], np.ndarray]:
    found = [(number, split_names(cell)) for number, cell in cells]
    names = list(class_names) if class_names else sorted({name for _, some in found for name in some})
    if not names:
        raise ValueError(f"{where!r} holds no label: give each image its label names, joined by |")
    place = {name: c for c, name in enumerate(names)}
    labels = np.zeros((len(found), len(names)), dtype=np.int8)
    for row, (number, some) in enumerate(found):
        for name in some:
            if name not in place:
                raise ValueError(f"{where!r}, line {number}: {name!r} is not in class_names: correct one")
            labels[row, place[name]] = 1
    return names, labels


def split_names(cell: str) -> list[str]:
    r"""The names in a cell, separated by ``|`` or ``;``; inside a name ``|``, ``;`` and ``\`` are escaped by ``\``."""
    parts = (re.sub(r"\\(.)", r"\1", part).strip() for part in re.findall(r"(?:\\.|[^\\|;])+", cell))
    return [part for part in parts if part]


def _columns(
    where: str,
    header: list[str],
    rest: list[int],
    rows: list[tuple[int, list[str]]],
    class_names: Sequence[str] | None,
) -> tuple[list[str], np.ndarray]:
    names = [header[k] for k in rest]
    if not names:
        raise ValueError(f"{where!r}, line 1, has no column of labels: add one for each class, or one called labels")
    if class_names and {*class_names} != {*names}:
        odd = sorted({*class_names} ^ {*names})
        raise ValueError(f"{where!r}, line 1, and class_names differ in {odd[:5]}: correct one")
    labels = np.empty((len(rows), len(rest)), dtype=np.int8)
    for row, (number, cells) in enumerate(rows):
        for column, k in enumerate(rest):
            if cells[k] not in VALUES:
                raise ValueError(
                    f"{where!r}, line {number}: {header[k]!r} must be 0, 1 or empty (unknown), got {cells[k]!r}: "
                    "correct it, or rename a column of label names to 'labels'"
                )
            labels[row, column] = VALUES[cells[k]]
    order = [names.index(name) for name in class_names or names]
    return [names[k] for k in order], labels[:, order]
