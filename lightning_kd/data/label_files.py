"""Label noise that is read from a file of given labels."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lightning_kd.core.notes import note
from lightning_kd.data.array_files import only_numbers, read_arrays, to_target
from lightning_kd.data.class_noise import SymmetricNoise
from lightning_kd.data.label_noise import CleanLabels, LabelNoise, estimate_transition, sample_transition
from lightning_kd.data.label_rows import find_rows
from lightning_kd.spreadsheet import as_written, column_name, read_rows, without_zeros

# columns whose whole numbers are class indices; those of class_name are class names
NUMBERED = ("given", "class_index")


class StoredNoise(LabelNoise):
    """Given labels that are stored; optionally, labels drawn from the transition matrix of the stored ones.

    Args:
        synthetic: estimate the transition matrix of the stored labels, and draw each label from it. Confusions between
            classes are the same, but no longer depend on the single sample.
        seed: of the labels drawn with ``synthetic``; 0 or more.
    """

    def __init__(self, synthetic: bool = False, seed: int = 0) -> None:
        self.synthetic = synthetic
        super().__init__(seed)

    @abstractmethod
    def read(self, clean: CleanLabels) -> tuple[np.ndarray, np.ndarray | None]:
        """The stored labels ``[N]``, and the clean labels stored with them (``None`` if there are none)."""

    def draw(self, clean: CleanLabels, generator: np.random.Generator) -> np.ndarray:
        given, stored = self.read(clean)
        count = len(clean.target)
        given = to_target(np.asarray(given), count, clean.num_classes, f"labels of {self}").numpy()
        if stored is not None:
            different = count if len(stored) != count else int((np.asarray(stored) != clean.target).sum())
            if different:
                raise ValueError(
                    f"{self}: the clean labels of its file differ from those of the data set at {different} of {count} "
                    "samples: give the file made for this data set, in the same order"
                )
        if not self.synthetic:
            return given
        return sample_transition(clean.target, estimate_transition(clean.target, given, clean.num_classes), generator)

    def without_files(self) -> LabelNoise:
        rate = self.nominal_rate
        return SymmetricNoise(0.4 if np.isnan(rate) else rate, "exclusive", self.seed)


class LabelFile(StoredNoise):
    """Reads the given labels from a file, one for each sample of the training array, in its order.

    Labels are class indices from 0 on, or class names; if all are whole numbers they are class indices. If the classes
    have other whole numbers as names than their indices (folders ``1``, ``10``, ``2``, or labels from 1 on), the name
    of the column in a ``.csv`` or of the array in an ``.npz`` must tell which is meant: ``class_name``, or
    ``class_index`` (or ``given``, as in files that this package writes). A file may be

    - ``.npy``: one array ``[N]``;
    - ``.npz``: the array ``key``. Clean labels under ``clean`` must equal the data set's. The ``noise.npz`` of another
      run is such a file, so two methods can be trained on the same labels;
    - ``.csv``, separated by commas, semicolons or tabs: one label per line; or, with a header (a single cell must be
      ``key``, ``label``, ``given``, ``class_name`` or ``class_index``), the column ``key``. With a column ``index``
      each line is for that sample, in any order; samples without a line, or with an empty label, keep the data set's
      own label, so a file may hold corrections only. A printed note counts its labels. Where the samples are image
      files and there is a column ``path``, a line is for the file of that name at whatever position; lines for missing
      files are skipped, with a note. ``2.0`` is read as 2, because pandas writes whole numbers so in columns with empty
      cells. The apostrophe that this package writes before a name that looks like a formula (``'=x``) is dropped.

    Args:
        path: the file.
        key: name of the array or column. Default: ``label``, else ``given``, ``class_name``, ``class_index``, or the
            only one.
        synthetic: draw the labels from the transition matrix of the stored labels instead.
        seed: of the labels drawn with ``synthetic``; 0 or more.

    Raises:
        ValueError: for another suffix; when read, for a damaged file, a label out of range, a wrong number of labels, a
            sample with two lines, or clean labels other than the data set's.
        FileNotFoundError: when read, where the file does not exist.
    """

    def __init__(self, path: str, key: str | None = None, synthetic: bool = False, seed: int = 0) -> None:
        if Path(path).suffix.lower() not in (".npy", ".npz", ".csv"):
            raise ValueError(f"path must end in .npy, .npz or .csv, got {path!r}: convert the labels to one of them")
        self.path = path
        self.key = key
        super().__init__(synthetic, seed)

    def read(self, clean: CleanLabels) -> tuple[np.ndarray, np.ndarray | None]:
        if Path(self.path).suffix.lower() == ".csv":
            columns = read_columns(Path(self.path), self.key)
            column = self._choose([name for name in columns if name != "index"])
            if "index" in columns:
                columns = {name: cells[columns[column] != ""] for name, cells in columns.items()}
                if not len(columns["index"]):
                    raise ValueError(f"the column {column} of {self.path!r} is empty: fill in the labels to correct")
                columns["index"], here = find_rows(columns, clean.image, self.path)
                columns = {name: cells[here] for name, cells in columns.items()}
            labels = class_indices(columns[column], clean.class_names, repr(self.path), column)
            if "index" in columns:
                labels = _corrected(clean.target, columns["index"], labels, self.path)
            return labels, None
        arrays = read_arrays(Path(self.path))
        key = self._choose(list(arrays))
        indices = {
            name: class_indices(arrays[name], clean.class_names, repr(self.path), key)
            for name in {key, "clean"} & {*arrays}
        }
        return indices[key], indices.get("clean")

    def _choose(self, names: list[str]) -> str:
        if self.key is None:
            for name in ("label", "given", "class_name", "class_index"):
                if name in names:
                    return name
            if len(names) == 1:
                return names[0]
        elif self.key in names:
            return self.key
        raise ValueError(f"key={self.key!r} is not in {self.path!r}, which holds {', '.join(names)}: give one of them")


def read_columns(path: Path, key: str | None = None) -> dict[str, np.ndarray]:
    """The columns of a ``.csv`` as strings, by the names in its header; without a header the only column is ``""``.

    The first line is a header if it has several cells, or its only cell is ``label``, ``class_name``, ``given``,
    ``class_index`` or ``key``.

    Raises:
        FileNotFoundError, PermissionError: where the file does not exist, or may not be read.
        ValueError: where it is empty or not text, two columns have the same name, or lines have different numbers of
            cells.
    """
    rows = [cells for _, cells in read_rows(path, "path")]
    width = max((k + 1 for cells in rows for k, cell in enumerate(cells) if cell), default=0)
    rows = [cells[:width] for cells in rows]  # without columns that are empty from the first line on
    named = rows and (len(rows[0]) > 1 or column_name(rows[0][0]) in ("label", "class_name", *NUMBERED, key))
    header = [column_name(cell) if cell != key else cell for cell in rows[0]] if named else [""]
    lines = rows[1:] if named else rows
    if not lines:
        raise ValueError(f"{str(path)!r} holds no label: give one for each sample")
    if twice := [name for name in header if header.count(name) > 1]:
        raise ValueError(f"{str(path)!r} names the column {twice[0]!r} twice in its first line: rename or remove one")
    for line in lines:
        if len(line) != len(header):
            raise ValueError(f"{str(path)!r} must have {len(header)} cells in each line, got {line}: correct that line")
    return {name: np.array(column) for name, column in zip(header, zip(*lines, strict=True), strict=True)}


def class_indices(labels: np.ndarray, class_names: Sequence[str], where: str, column: str) -> np.ndarray:
    """Labels as int64 class indices; if all labels are whole numbers they are class indices, else class names.

    Args:
        labels: strings or integers ``[N]``; other arrays are returned unchanged.
        class_names: in the order of the class indices.
        where: where the labels come from, for messages.
        column: name of their column or array, which may tell whether whole numbers are class indices or names.

    Raises:
        ValueError: for an unknown label, and for whole numbers that could be class indices or names.
    """
    names = {name: c for c, name in enumerate(class_names)}
    names = {as_written(name): c for name, c in names.items()} | names
    either = only_numbers(class_names) and any(name != str(c) for c, name in enumerate(class_names))
    if labels.dtype.kind in "iu" and (column == "class_name" or (either and column not in NUMBERED)):
        labels = labels.astype(str)
    if labels.dtype.kind != "U":
        return labels
    values, inverse = np.unique(labels, return_inverse=True)
    text = {v: v if v in names else without_zeros(v) for v in values.tolist()}
    # 18 digits at most: longer ones do not fit into int64
    number = {v: int(t) for v, t in text.items() if len(t) <= 18 and t.removeprefix("-").isdecimal()}
    name = {v: names[t] for v, t in text.items() if t in names}
    if len(number) == len(values) and either and column not in ("class_name", *NUMBERED):
        raise ValueError(
            f"the labels of {where} may be class indices or class names, which are {', '.join(names)}: rename the "
            "column of a .csv, or the key of an .npz, to class_name or class_index"
        )
    index = number if len(number) == len(values) and column != "class_name" else name
    for value in sorted(values, key=number.__contains__):  # names a label that is not a number first
        if value not in index:
            raise ValueError(
                f"{where} holds the label {str(value)!r}: all labels must be class indices, or all class names; "
                "correct it"
            )
    return np.array([index[value] for value in values], dtype=np.int64)[inverse]


def _corrected(own: np.ndarray, place: np.ndarray, labels: np.ndarray, path: str) -> np.ndarray:
    """A copy of the labels ``own`` in which the positions ``place`` are replaced by ``labels``."""
    outside = place[(place < 0) | (place >= len(own))]
    if len(outside):
        raise ValueError(
            f"the column index of {path!r} must be from 0 to {len(own) - 1}, got {outside[0]}: is it for this data set?"
        )
    values, count = np.unique(place, return_counts=True)
    if len(values) < len(place):
        raise ValueError(
            f"the column index of {path!r} holds {values[count > 1][0]} more than once: keep one line for each sample"
        )
    if len(place) < len(own):
        note(f"{path!r} holds {len(place)} of {len(own)} labels: the other samples keep the data set's own labels")
    given = own.copy()
    given[place] = labels
    return given
