"""Candidate labels that are read from a file."""

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
    """Reads the candidates from a file. It may be

    - ``.npy`` or ``.npz``: 0 and 1, ``[N, K]``, a row for each sample of the training array, in its order. In an
      ``.npz`` it is the array ``key``; by default ``candidates``, else ``given`` (as in the ``noise.npz`` of another
      run), else the only array;
    - ``.csv``, separated by commas, semicolons or tabs, with a line for each candidate. Its columns are ``index`` (or
      ``item``), the position of the sample, or ``path`` (or ``file``), its image file with or without the folders; and
      ``key`` (by default ``label``), a class index or class name, as in ``LabelFile``. Lines without a label or with
      label -1, and lines for files that are not training images, are skipped. A sample without a line has its own
      label as its only candidate.

    Args:
        path: the ``.npy``, ``.npz`` or ``.csv`` file.
        key: name of the array or column.
        meta_from_single: draw the clean meta set only from samples with one candidate, because only their labels are
            certain. (Where no true label is known, the class that the data set gives a sample may be any of its
            candidates.)

    Raises:
        ValueError: for another suffix; when read, for a damaged file, or candidates that do not match the data set.
        FileNotFoundError: when read, where the file does not exist.
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
                f"{self.path!r} has no line for {len(single)} of {len(given)} samples: their only candidate is their "
                "own label"
            )
        return given

    def without_files(self) -> CandidateSets:
        return UniformCandidates(0.3)
