"""Candidates that somebody gave, in a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lightning_kd.core.notes import note
from lightning_kd.data.array_files import array_named
from lightning_kd.data.candidate_sets import CandidateSets, UniformCandidates
from lightning_kd.data.label_noise import CleanLabels
from lightning_kd.data.sample_tables import check_label_path, read_sample_labels

__all__ = ["CandidateFile"]


class CandidateFile(CandidateSets):
    """The candidates are in a file. It may be

    - ``.npy`` or ``.npz``: 0 and 1, ``[N, K]``, a row for each sample of the training array, in its order. Of an
      ``.npz`` the array ``key``, by default ``candidates``, then ``given`` (as in the ``noise.npz`` of another run),
      then the only one;
    - ``.csv``, separated by commas, semicolons or tabs: a line for each candidate, with the columns ``index`` (of the
      sample; also called ``item``) or ``path`` (of an image folder, with or without its folders; ``file``) and ``key``,
      by default ``label``, a number or name of a class, as ``LabelFile`` reads them. Lines without a label, or with -1,
      and those for files that are no training images, are left out. A sample without a line has its own label alone.

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
        check_label_path(path, "candidates")
        self.path = path
        self.key = key
        self.meta_from_single = meta_from_single
        super().__init__()

    def draw(self, clean: CleanLabels, generator: np.random.Generator) -> np.ndarray:
        if Path(self.path).suffix.lower() == ".csv":
            return self._from_lines(clean)
        return array_named(Path(self.path), self.key, "candidates")

    def _from_lines(self, clean: CleanLabels) -> np.ndarray:
        item, label, _ = read_sample_labels(Path(self.path), clean, key=self.key)
        given = np.zeros((len(clean.target), clean.num_classes), dtype=np.uint8)
        given[item, label] = 1
        single = np.flatnonzero(~given.any(1))
        given[single, clean.target[single]] = 1
        if len(single):
            note(
                f"{self.path!r} has no line for {len(single)} of {len(given)} samples: they have their own label alone"
            )
        return given

    def without_files(self) -> CandidateSets:
        return UniformCandidates(0.3)
