"""Data module for your own multi-label images: a folder of image files and a table of labels."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.notes import note
from lightning_kd.core.seeding import numpy_generator
from lightning_kd.data.arguments import names_of
from lightning_kd.data.array_files import Arrays
from lightning_kd.data.image_files import images_below
from lightning_kd.data.label_tables import SPLITS, LabelTable, read_label_table
from lightning_kd.data.multi_label_files import MultiLabelFilesDataModule
from lightning_kd.data.splits import take_fraction, without

__all__ = ["MultiLabelFolderDataModule"]


class MultiLabelFolderDataModule(MultiLabelFilesDataModule):
    """Your own images anywhere below a folder, and a ``.csv`` with the labels of each image.

    The table is separated by commas, semicolons or tabs and has a header and a line for each image. Its column ``file``
    (or ``path``, ``image``, ``filename``) is the path below ``root``, or just the name where only one image has it. The
    labels are

    - a column for each class with 1, 0 or an empty cell (unknown); or
    - one column ``labels`` (or ``label``, ``tags``, ``classes``) with the names of the positive labels, separated by
      ``|`` or ``;``; all other labels are negative.

    A column ``split`` may hold ``train``, ``val`` or ``test``; without it ``test_fraction`` of the images are the test
    set, the same for every ``seed``. Images without a line are left out, with a note. See
    ``MultiLabelFilesDataModule`` for how images are read and for further arguments.

    Args:
        root: the folder of the images.
        table: the ``.csv``. Default: ``labels.csv`` in ``root``.
        class_names: the classes, in this order. Default: the columns of labels, or all names that occur, sorted.
        test_fraction: fraction that becomes the test set where the table has no splits, in (0, 1).
        kwargs: see ``MultiLabelFilesDataModule``.

    Raises:
        ValueError: naming file and line, for a table that is damaged or does not match the images.
        FileNotFoundError, PermissionError: where a file or folder does not exist or may not be read.
    """

    def __init__(
        self,
        root: str,
        table: str | None = None,
        class_names: Sequence[str | int] | None = None,
        test_fraction: float = 0.2,
        **kwargs: Any,
    ) -> None:
        check_numbers(above=0, below=1, remedy="give a fraction", test_fraction=test_fraction)
        given = names_of(class_names)
        path = Path(root) / "labels.csv" if table is None else Path(table)
        self.table = table
        self.test_fraction = test_fraction
        self._path = path
        self._table: LabelTable | None = None
        if kwargs.get("fake") and not path.exists():
            names = given or [f"class_{c}" for c in range(10)]
        else:
            self._table = read_label_table(path, given)
            names = self._table.class_names
        super().__init__(class_names=names, root=root, **kwargs)

    def load_arrays(self) -> Arrays:
        assert self._table is not None
        _, _, labels, _, splits = self._table
        images = self._images()
        # repeated lines of an image are ignored if they are equal
        first: dict[str, int] = {}
        for row, image in enumerate(images):
            earlier = first.setdefault(image, row)
            if not np.array_equal(labels[earlier], labels[row]) or (splits and splits[earlier] != splits[row]):
                lines = self._table.lines
                raise ValueError(
                    f"{str(self._path)!r}, lines {lines[earlier]} and {lines[row]}, are for one image, {image!r}, and "
                    "differ: remove one"
                )
        rows = np.array([*first.values()])
        if splits is None:
            generator = numpy_generator(0, "test_split")  # does not use self.seed: all runs have the same test images
            zeros = np.zeros(len(rows), dtype=np.int64)
            test = take_fraction(zeros, 1, self.test_fraction, generator, leave=1)
            if not len(test):
                raise ValueError(
                    f"test_fraction={self.test_fraction} of {len(rows)} images leaves the test split empty: raise it"
                )
            parts = {"train": rows[without(len(rows), test)], "val": rows[:0], "test": rows[test]}
        else:
            parts = {name: rows[[splits[row] == name for row in rows]] for name in SPLITS}
            for name in ("train", "test"):
                if not len(parts[name]):
                    raise ValueError(f"{str(self._path)!r} has no line with split {name!r}: mark some")
        made = {
            name: ([images[row] for row in some], torch.from_numpy(labels[some]).float())
            for name, some in parts.items()
        }
        return Arrays(*made["train"], *made["test"], *(made["val"] if len(parts["val"]) else ()))

    def _images(self) -> list[str]:
        """The image file of each line of the table."""
        assert self._table is not None
        found = images_below(Path(self.root), [self._path])
        by_path = {os.path.relpath(path, self.root).replace(os.sep, "/"): path for path in found}
        by_name: dict[str, list[str]] = {}
        for path in found:
            by_name.setdefault(os.path.basename(path), []).append(path)
        images = []
        for name, number in zip(self._table.files, self._table.lines, strict=True):
            plain = name.replace("\\", "/").removeprefix("./")
            some = [by_path[plain]] if plain in by_path else by_name.get(plain, [])
            if len(some) != 1:
                what = "is no image" if not some else f"is the name of {len(some)} images"
                raise ValueError(
                    f"{str(self._path)!r}, line {number}: {name!r} {what} below {self.root!r}: correct the path"
                )
            images += some
        if len(by_path) > len({*images}):
            note(f"{self._path} has no line for {len(by_path) - len({*images})} of {len(by_path)} images: left out")
        return images
