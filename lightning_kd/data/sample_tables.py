"""Tables with a line for each label that somebody gave a sample, several of one sample among them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lightning_kd.data.array_files import to_target
from lightning_kd.data.label_files import class_indices, read_columns
from lightning_kd.data.label_noise import CleanLabels
from lightning_kd.data.label_rows import find_rows
from lightning_kd.spreadsheet import without_zeros

__all__ = ["SampleLabels", "read_sample_labels"]

# how the columns may be called
_SAMPLE = {"index": ("item", "index"), "path": ("file", "path")}
_LABEL = ("label", "class_name", "class_index", "given")


class SampleLabels(NamedTuple):
    """``item`` and ``label`` int64 ``[n]``, the sample and the class of each line, and ``others``, further columns as
    text ``[n]``."""

    item: np.ndarray
    label: np.ndarray
    others: dict[str, np.ndarray]


def check_label_path(path: str, what: str) -> None:
    """Raise ``ValueError`` unless a file of labels, called ``what``, is one of arrays or a table by its name."""
    if Path(path).suffix.lower() not in (".npy", ".npz", ".csv"):
        raise ValueError(f"path must end in .npy, .npz or .csv, got {path!r}: convert the {what} to one of them")


def read_sample_labels(
    path: Path, clean: CleanLabels, others: Mapping[str, Sequence[str]] | None = None, key: str | None = None
) -> SampleLabels:
    """The lines of a ``.csv`` that are for samples of a data set and have a label.

    A line is for the position in the training array in the column ``item`` (or ``index``), or for the image in ``file``
    (or ``path``), see ``find_rows``. Those without a label, or with -1, are left out.

    Args:
        path: the table.
        clean: the data set.
        others: further columns that there must be, each with the names that it may have.
        key: the column of the labels. Default: ``label``, ``class_name``, ``class_index`` or ``given``.

    Raises:
        FileNotFoundError, PermissionError: see ``read_columns``.
        ValueError: for a damaged table, one that lacks a column, an empty cell beside a label, and a class or sample
            that the data set has not.
    """
    where, columns = repr(str(path)), read_columns(path, key)
    wanted = {**_SAMPLE, **(others or {}), "label": _LABEL if key is None else (key,)}
    names = {part: next((n for n in known if n in columns), None) for part, known in wanted.items()}
    files = isinstance(clean.image, list)
    if names["index"] is None and (names["path"] is None or not files):
        remedy = "item or file" if files else "item, as the samples are no files"
        raise ValueError(f"{where} does not say which sample its lines are for: add the column {remedy}")
    for part, known in wanted.items():
        if part not in _SAMPLE and names[part] is None:
            raise ValueError(f"{where} must have the column {known[0]}, got {', '.join(columns)}: name it so")
    found = {part: columns[name] for part, name in names.items() if name is not None}
    there = np.array(
        [cell != "" and (cell in clean.class_names or without_zeros(cell) != "-1") for cell in found["label"].tolist()]
    )
    found = {part: cells[there] for part, cells in found.items()}
    label_name = str(names["label"])
    if not len(found["label"]):
        raise ValueError(f"the column {label_name} of {where} is empty: fill in the labels")
    for part in ("path" if names["index"] is None else "index", *(others or ())):
        if (empty := found[part] == "").any():
            raise ValueError(
                f"the column {names[part]} of {where} is empty in {int(empty.sum())} lines with a label, such as "
                f"{str(found['label'][empty.argmax()])!r}: fill it in"
            )
    item, here = find_rows(found, clean.image, str(path))
    found, item = {part: cells[here] for part, cells in found.items()}, item[here]
    label = class_indices(found["label"], clean.class_names, where, label_name)
    label = to_target(label, len(item), clean.num_classes, f"{label_name} of {where}").numpy()
    outside = item[(item < 0) | (item >= len(clean.target))]
    if len(outside):
        raise ValueError(
            f"the column {names['index']} of {where} must be from 0 to {len(clean.target) - 1}, got {outside[0]}: "
            "is it for this data set?"
        )
    return SampleLabels(item, label, {part: found[part] for part in others or ()})
