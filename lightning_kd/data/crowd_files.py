"""Labels by several annotators, in a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lightning_kd.data.array_files import only_numbers, read_arrays, to_target
from lightning_kd.data.crowd_labels import CrowdLabels, SimulatedCrowd
from lightning_kd.data.label_files import class_indices, read_columns
from lightning_kd.data.label_noise import CleanLabels
from lightning_kd.data.label_rows import find_rows

__all__ = ["CrowdAnnotations"]

# how the columns of a table of annotations may be called
_COLUMNS = {
    "index": ("item", "index"),
    "path": ("file", "path"),
    "annotator": ("annotator", "worker"),
    "label": ("label", "class_name", "class_index", "given"),
}


class CrowdAnnotations(CrowdLabels):
    """The annotations are in a file. It may be

    - ``.csv``, separated by commas, semicolons or tabs: a line for each annotation, with the columns ``item`` (the
      position in the training array, from 0 on; also called ``index``) or ``file`` (of an image folder; ``path``),
      ``annotator`` (or ``worker``; any name) and ``label``, a number or name of a class, as ``LabelFile`` reads them.
      Lines without a label, and those for files that are no training images, are left out; samples without a line have
      no annotation;
    - ``.npy`` or ``.npz``: integers ``[N, R]``, a row for each sample of the training array, in its order, and a column
      for each annotator, -1 where there is none. Of an ``.npz`` the array ``key``, by default ``annotations``, then
      ``given`` (as in the ``noise.npz`` of another run), then the only one.

    Args:
        path: the file.
        key: the array.

    Raises:
        ValueError: for a suffix that is none of these; when read, for a damaged file, a class or sample that the data
            set has not, and two labels by one annotator for one sample.
        FileNotFoundError: when read, where there is no such file.
    """

    def __init__(self, path: str, key: str | None = None) -> None:
        if Path(path).suffix.lower() not in (".npy", ".npz", ".csv"):
            raise ValueError(
                f"path must end in .npy, .npz or .csv, got {path!r}: convert the annotations to one of them"
            )
        self.path = path
        self.key = key
        super().__init__()

    def draw(self, clean: CleanLabels, generator: np.random.Generator) -> np.ndarray:
        if Path(self.path).suffix.lower() == ".csv":
            return self._from_lines(clean)
        arrays = read_arrays(Path(self.path))
        known = ["annotations", "given", *(arrays if len(arrays) == 1 else ())] if self.key is None else [self.key]
        for key in known:
            if key in arrays:
                return arrays[key]
        raise ValueError(
            f"key={self.key!r} is none of {self.path!r}, which holds {', '.join(arrays)}: give one of them"
        )

    def _from_lines(self, clean: CleanLabels) -> np.ndarray:
        where, columns = repr(self.path), read_columns(Path(self.path))
        names = {part: next((n for n in known if n in columns), None) for part, known in _COLUMNS.items()}
        files = isinstance(clean.image, list)
        if names["index"] is None and (names["path"] is None or not files):
            remedy = "item or file" if files else "item, as the samples are no files"
            raise ValueError(f"{where} does not say which sample its lines are for: add the column {remedy}")
        for part in ("annotator", "label"):
            if names[part] is None:
                raise ValueError(f"{where} must have the column {part}, got {', '.join(columns)}: name it so")
        label_name = names["label"]
        assert label_name is not None
        found = {part: columns[name] for part, name in names.items() if name is not None}
        found = {part: cells[columns[label_name] != ""] for part, cells in found.items()}
        if not len(found["label"]):
            raise ValueError(f"the column {label_name} of {where} is empty: fill in the labels")
        item, here = find_rows(found, clean.image, self.path)
        item, annotator = item[here], found["annotator"][here]
        label = class_indices(found["label"][here], clean.class_names, where, label_name)
        label = to_target(label, len(item), clean.num_classes, f"{label_name} of {where}").numpy()
        outside = item[(item < 0) | (item >= len(clean.target))]
        if len(outside):
            raise ValueError(
                f"the column {names['index']} of {where} must be from 0 to {len(clean.target) - 1}, got {outside[0]}: "
                "is it for this data set?"
            )
        people = np.unique(annotator).tolist()
        if only_numbers(people):
            people.sort(key=int)
        self._names = people
        number = {name: r for r, name in enumerate(people)}
        column = np.array([number[name] for name in annotator.tolist()])
        given = np.full((len(clean.target), len(people)), -1, dtype=np.int64)
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
