"""Labels by several annotators that are read from a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lightning_kd.data.array_files import array_named, only_numbers
from lightning_kd.data.crowd_labels import CrowdLabels, SimulatedCrowd
from lightning_kd.data.label_noise import CleanLabels
from lightning_kd.data.sample_tables import check_label_path, read_sample_labels
from lightning_kd.spreadsheet import without_zeros

__all__ = ["CrowdAnnotations"]


class CrowdAnnotations(CrowdLabels):
    """Reads the annotations from a file. It may be

    - ``.csv``, separated by commas, semicolons or tabs, with a line for each annotation. Its columns are ``item`` (or
      ``index``), the position in the training array from 0 on, or ``file`` (or ``path``), the image file with or
      without its folders; ``annotator`` (or ``worker``), any name; and ``label``, a class index or class name, as in
      ``LabelFile``. Lines without a label or with label -1, and lines for files that are not training images, are
      skipped; samples without a line have no annotation;
    - ``.npy`` or ``.npz``: integers ``[N, R]``, a row for each sample of the training array, in its order, and a column
      for each annotator, -1 for no annotation. In an ``.npz`` it is the array ``key``; by default ``annotations``, else
      ``given`` (as in the ``noise.npz`` of another run), else the only array.

    Where no true label of the training images is known, put the images into the folder of any class (and give a
    validation set of your own): that class is used for splits and printed statistics only, no method learns from it.

    Args:
        path: the ``.csv``, ``.npy`` or ``.npz`` file.
        key: name of the array in an ``.npz``.

    Raises:
        ValueError: for another suffix; when read, for a damaged file, a class or sample that the data set does not
            have, or two labels by one annotator for one sample.
        FileNotFoundError: when read, where the file does not exist.
    """

    def __init__(self, path: str, key: str | None = None) -> None:
        check_label_path(path, "annotations")
        self.path = path
        self.key = key
        super().__init__()

    def draw(self, clean: CleanLabels, generator: np.random.Generator) -> np.ndarray:
        if Path(self.path).suffix.lower() == ".csv":
            return self._from_lines(clean)
        return array_named(Path(self.path), self.key, "annotations")

    def _from_lines(self, clean: CleanLabels) -> np.ndarray:
        where = repr(self.path)
        item, label, others = read_sample_labels(Path(self.path), clean, {"annotator": ("annotator", "worker")})
        annotator = others["annotator"]
        whole = np.array([*map(without_zeros, annotator.tolist())])
        if only_numbers(whole.tolist()):  # pandas writes 7 as 7.0 in columns with empty cells
            annotator = whole
        people = np.unique(annotator).tolist()
        if only_numbers(people):
            people.sort(key=int)
        self._names = people
        number = {name: r for r, name in enumerate(people)}
        column = np.array([number[name] for name in annotator.tolist()])
        given = np.full((len(clean.target), len(people)), -1, dtype=np.int16)
        given[item, column] = label
        if (twice := given[item, column] != label).any():
            at = int(twice.argmax())
            raise ValueError(
                f"{where} holds two labels by annotator {annotator[at]} for sample {item[at]}, "
                f"{clean.class_names[label[at]]} and {clean.class_names[given[item[at], column[at]]]}: keep one"
            )
        return given

    def without_files(self) -> CrowdLabels:
        return SimulatedCrowd()
