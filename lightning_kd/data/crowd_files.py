"""Labels by several annotators, in a file."""

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
    """The annotations are in a file. It may be

    - ``.csv``, separated by commas, semicolons or tabs: a line for each annotation, with the columns ``item`` (the
      position in the training array, from 0 on; also called ``index``) or ``file`` (of an image folder, with or
      without its folders; ``path``), ``annotator`` (or ``worker``; any name) and ``label``, a number or name of a
      class, as ``LabelFile`` reads them. Lines without a label, or with -1, and those for files that are no training
      images, are left out; samples without a line have no annotation;
    - ``.npy`` or ``.npz``: integers ``[N, R]``, a row for each sample of the training array, in its order, and a column
      for each annotator, -1 where there is none. Of an ``.npz`` the array ``key``, by default ``annotations``, then
      ``given`` (as in the ``noise.npz`` of another run), then the only one.

    Where no true label of the training images is known, put them into the folder of any class (and give a validation
    set of your own): that is used for splits and for what is printed, and not learnt.

    Args:
        path: the file.
        key: the array.

    Raises:
        ValueError: for a suffix that is none of these; when read, for a damaged file, a class or sample that the data
            set has not, and two labels by one annotator for one sample.
        FileNotFoundError: when read, where there is no such file.
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
        if only_numbers(whole.tolist()):  # 7.0, as programs write 7 beside empty cells
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
