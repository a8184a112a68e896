"""Reads tables with one line per label of a sample, where a sample may have several lines."""

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

# accepted names of the columns
_SAMPLE = {"index": ("item", "index"), "path": ("file", "path")}
_LABEL = ("label", "class_name", "class_index", "given")


class SampleLabels(NamedTuple):
    """The lines of a table.

    Attributes:
        item: int64 ``[n]``, position of the sample of each line.
        label: int64 ``[n]``, class index of each line.
        others: further columns by name, strings ``[n]``.
    """

    item: np.ndarray
    label: np.ndarray
    others: dict[str, np.ndarray]


def check_label_path(path: str, what: str) -> None:
    """Raise a ``ValueError`` unless ``path`` ends in .npy, .npz or .csv; ``what`` is the content, for the message."""
    if Path(path).suffix.lower() not in (".npy", ".npz", ".csv"):
        raise ValueError(f"path must end in .npy, .npz or .csv, got {path!r}: convert the {what} to one of them")


def read_sample_labels(
    path: Path, clean: CleanLabels, others: Mapping[str, Sequence[str]] | None = None, key: str | None = None
) -> SampleLabels:
    """The lines of a ``.csv`` that are for samples of a data set and have a label.

    A line is for the sample at the position in the column ``item`` (or ``index``), or for the image in ``file`` (or
    ``path``), see ``find_rows``. Lines without a label, or with label -1, are skipped.

    Args:
        path: the ``.csv`` file.
        clean: the data set.
        others: further columns that are required, each with the names that it may have.
        key: name of the column of labels. Default: ``label``, else ``class_name``, ``class_index`` or ``given``.

    Raises:
        FileNotFoundError, PermissionError: as in ``read_columns``.
        ValueError: for a damaged table, a missing column, an empty cell in a line with a label, or a class or sample
            that the data set does not have.
    """
    where, columns = repr(str(path)), read_columns(path, key)
    wanted = {**_SAMPLE, **(others or {}), "label": _LABEL if key is None else (key,)}
    names = {part: next((n for n in known if n in columns), None) for part, known in wanted.items()}
    files = isinstance(clean.image, list)
    if names["index"] is None and (names["path"] is None or not files):
        remedy = "item or file" if files else "item, because the samples are not files"
        raise ValueError(f"{where} does not say which sample its lines are for: add the column {remedy}")
    for part, known in wanted.items():
        if part not in _SAMPLE and names[part] is None:
            raise ValueError(f"{where} must have the column {known[0]}, got {', '.join(columns)}: add it")
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
