"""Candidates that somebody gave, in a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lightning_kd.core.notes import note
from lightning_kd.data.array_files import read_arrays, to_target
from lightning_kd.data.candidate_sets import CandidateSets, UniformCandidates
from lightning_kd.data.label_files import class_indices, read_columns

__all__ = ["CandidateFile"]


class CandidateFile(CandidateSets):
    """The candidates are in a file. It may be

    - ``.npy`` or ``.npz``: 0 and 1, ``[N, K]``, a row for each sample of the training array, in its order. Of an
      ``.npz`` the array ``key``, by default ``candidates``, then ``given`` (as in the ``noise.npz`` of another run),
      then the only one;
    - ``.csv``: a line for each candidate, with the columns ``index`` (of the sample) and ``key``, by default ``label``,
      a number or name of a class, as ``LabelFile`` reads them. A sample without a line has its own label alone.

    Args:
        path: the file.
        key: the array or the column.
        meta_from_single: the data set's own labels are sure only where a sample has one candidate: draw the clean meta
            set from those. (Where no true label is known, give a sample any of its candidates as its own.)

    Raises:
        ValueError: for a suffix that is none of these; when read, for a damaged file, and candidates that do not
            belong to the data set.
        FileNotFoundError: when read, where there is no such file.
    """

    def __init__(self, path: str, key: str | None = None, meta_from_single: bool = False) -> None:
        if Path(path).suffix.lower() not in (".npy", ".npz", ".csv"):
            raise ValueError(
                f"path must end in .npy, .npz or .csv, got {path!r}: convert the candidates to one of them"
            )
        self.path = path
        self.key = key
        self.meta_from_single = meta_from_single
        super().__init__()

    def draw(self, target: np.ndarray, class_names: Sequence[str], generator: np.random.Generator) -> np.ndarray:
        if Path(self.path).suffix.lower() == ".csv":
            return self._from_lines(target, class_names)
        arrays = read_arrays(Path(self.path))
        known = [self.key] if self.key is not None else ["candidates", "given", *(arrays if len(arrays) == 1 else ())]
        for key in known:
            if key in arrays:
                return arrays[key]
        raise ValueError(
            f"key={self.key!r} is none of {self.path!r}, which holds {', '.join(arrays)}: give one of them"
        )

    def _from_lines(self, target: np.ndarray, class_names: Sequence[str]) -> np.ndarray:
        key = self.key or "label"
        columns = read_columns(Path(self.path), key)
        if missing := {"index", key} - columns.keys():
            raise ValueError(f"{self.path!r} must have the columns index and {key}, it lacks {min(missing)}: add it")
        try:
            index = columns["index"].astype(np.int64)
        except ValueError as error:
            raise ValueError(
                f"the column index of {self.path!r} must hold whole numbers ({error}): correct it"
            ) from None
        wrong = (index < 0) | (index >= len(target))
        if wrong.any():
            raise ValueError(
                f"the column index of {self.path!r} must be from 0 to {len(target) - 1}, got {index[wrong][0]}: is it "
                "for this data set?"
            )
        label = class_indices(columns[key], class_names, repr(self.path), key)
        label = to_target(label, len(index), len(class_names), f"{key} of {self.path!r}").numpy()
        given = np.zeros((len(target), len(class_names)), dtype=np.uint8)
        given[index, label] = 1
        single = np.flatnonzero(~given.any(1))
        given[single, target[single]] = 1
        if len(single):
            note(
                f"{self.path!r} has no line for {len(single)} of {len(target)} samples: they have their own label alone"
            )
        return given

    def without_files(self) -> CandidateSets:
        return UniformCandidates(0.3)
