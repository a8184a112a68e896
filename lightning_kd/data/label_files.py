"""Labels that somebody gave, in a file."""

from __future__ import annotations

import csv
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lightning_kd.data.files import read_arrays, to_target
from lightning_kd.data.label_noise import CleanLabels, LabelNoise, estimate_transition, sample_transition
from lightning_kd.data.noise import SymmetricNoise


class StoredNoise(LabelNoise):
    """Labels that are read, not drawn; or drawn with the same transition matrix as those.

    Args:
        synthetic: estimate the transition matrix from the stored labels, and draw each label from it anew: the same
            confusions of classes, but no longer of single samples.
        seed: fixes the labels with ``synthetic``; 0 or more.
    """

    def __init__(self, synthetic: bool = False, seed: int = 0) -> None:
        self.synthetic = synthetic
        super().__init__(seed)

    @abstractmethod
    def read(self, clean: CleanLabels) -> tuple[np.ndarray, np.ndarray | None]:
        """The stored labels ``[N]`` and, where they are stored too, the clean ones that they belong to."""

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
    """The given labels are in a file, one for each sample of the training array, in its order.

    Labels are integers from 0 on, or names of classes. A file may be

    - ``.npy``: one array ``[N]``;
    - ``.npz``: the array ``key``. Clean labels under ``clean`` are compared with the data set's. The ``noise.npz`` of
      another run is such a file, so that two methods can be trained on the same labels;
    - ``.csv``: one label a line; or with a header, the column ``key``. With a column ``index`` the lines may come in
      any order, but each sample must be there once.

    Args:
        path: the file.
        key: the name of the array or column. By default ``label``, then ``given``, then the only one.
        synthetic: draw the labels anew with the transition matrix of the stored ones.
        seed: fixes the labels with ``synthetic``; 0 or more.

    Raises:
        ValueError: for a suffix that is none of these; when read, for a damaged file, a label out of range, a wrong
            number of labels, and for clean labels other than the data set's.
        FileNotFoundError: when read, where there is no such file.
    """

    def __init__(self, path: str, key: str | None = None, synthetic: bool = False, seed: int = 0) -> None:
        if Path(path).suffix not in (".npy", ".npz", ".csv"):
            raise ValueError(f"path must end in .npy, .npz or .csv, got {path!r}: convert the labels to one of them")
        self.path = path
        self.key = key
        super().__init__(synthetic, seed)

    def read(self, clean: CleanLabels) -> tuple[np.ndarray, np.ndarray | None]:
        if Path(self.path).suffix == ".csv":
            columns = read_columns(Path(self.path))
            labels = columns[self._choose([name for name in columns if name != "index"])]
            if "index" in columns:
                labels = _in_order(columns["index"], labels, len(clean.target), self.path)
            return class_indices(labels, clean.class_names, repr(self.path)), None
        arrays = read_arrays(Path(self.path))
        labels = arrays[self._choose(list(arrays))]
        return class_indices(labels, clean.class_names, repr(self.path)), arrays.get("clean")

    def _choose(self, names: list[str]) -> str:
        if self.key is None:
            for name in ("label", "given"):
                if name in names:
                    return name
            if len(names) == 1:
                return names[0]
        elif self.key in names:
            return self.key
        raise ValueError(f"key={self.key!r} is none of {self.path!r}, which holds {', '.join(names)}: give one of them")


def read_columns(path: Path) -> dict[str, np.ndarray]:
    """The columns of a ``.csv`` as text, by the names in its header; without a header the one column is ``""``.

    The first line is a header where it has several cells, or the one cell ``given`` or ``label``.

    Raises:
        FileNotFoundError, PermissionError: if there is no such file, or it may not be read.
        ValueError: if it is empty or not text, or its lines are not equally long.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as stream:
            rows = [[cell.strip() for cell in row] for row in csv.reader(stream) if row]
    except FileNotFoundError:
        raise FileNotFoundError(f"{str(path)!r} does not exist: give the path of a .csv file") from None
    except PermissionError:
        raise PermissionError(f"{str(path)!r} may not be read: check the permissions of the file") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{str(path)!r} is no .csv file in UTF-8 ({error}): write it again") from error
    header = rows[0] if rows and (len(rows[0]) > 1 or rows[0][0] in ("given", "label")) else [""]
    lines = rows if header == [""] else rows[1:]
    if not lines:
        raise ValueError(f"{str(path)!r} holds no label: give one for each sample")
    for line in lines:
        if len(line) != len(header):
            raise ValueError(f"{str(path)!r} must have {len(header)} cells in each line, got {line}: correct that line")
    return {name: np.array(column) for name, column in zip(header, zip(*lines, strict=True), strict=True)}


def class_indices(labels: np.ndarray, class_names: Sequence[str], where: str) -> np.ndarray:
    """Labels that are integers, texts of integers, or names of classes, as integers; other arrays are left alone.

    Raises:
        ValueError: for a text that is neither.
    """
    if labels.dtype.kind != "U":
        return labels
    values, inverse = np.unique(labels, return_inverse=True)
    index = {name: c for c, name in enumerate(class_names)}
    if not all(value in index for value in values):
        # all or none: a number that happens to be a class's name is still a number
        index = {value: int(value) for value in values if value.removeprefix("-").isdecimal()}
    for value in values:
        if value not in index:
            raise ValueError(f"{where} holds the label {str(value)!r}, neither a class nor a whole number: correct it")
    return np.array([index[value] for value in values], dtype=np.int64)[inverse]


def _in_order(index: np.ndarray, labels: np.ndarray, count: int, path: str) -> np.ndarray:
    """``labels`` sorted by ``index``, which must hold 0 to ``count - 1`` once each."""
    try:
        place = index.astype(np.int64)
    except ValueError as error:
        raise ValueError(f"the column index of {path!r} must hold whole numbers ({error}): correct it") from None
    found = np.unique(place[(place >= 0) & (place < count)])
    if len(found) != count or len(place) != count:
        raise ValueError(
            f"the column index of {path!r} must hold each of 0 to {count - 1} once, got {len(place)} lines with "
            f"{len(found)} of them: add or remove lines"
        )
    return labels[np.argsort(place)]
