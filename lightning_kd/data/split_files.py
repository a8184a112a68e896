"""The base class of data modules of image files: checks files before use, and leaves out damaged ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_kd.data.annotated_data import AnnotatedDataModule
from lightning_kd.data.image_check import check_images

# the splits whose images a stage uses
SPLITS_OF = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("test",)}


class SplitFiles(AnnotatedDataModule):
    """A data module of image files, which are checked before their split is used.

    Attributes:
        root: the folder of the labelled images, with or without the folders ``train``, ``val`` and ``test``.
        on_error: ``"raise"`` or ``"skip"``, see ``check_images``.
        image_range: see ``read_image``.
    """

    root: str
    on_error: str
    image_range: tuple[float, float] | None
    _checked: set[str]  # splits whose files were checked

    def setup(self, stage: str | None = None) -> None:
        """Load and split the data, once, and check the image files of the splits that the stage uses."""
        super().setup(stage)
        self._check(self._splits_of(stage))

    def _splits_of(self, stage: str | None) -> Sequence[str]:
        if self._only_new(stage):
            return ("predict",)
        return SPLITS_OF.get(stage or "", ()) if self.trainer is not None else ("train", "val", "test")

    def check_files(self, *splits: str) -> None:
        """Check the image files of some splits, once; without a Trainer only to leave out damaged ones.

        Raises:
            ValueError: where some cannot be read, or leaving them out would empty a split or a class.
        """
        self.setup("predict" if splits == ("predict",) else None)
        self._check(splits)

    def _check(self, splits: Sequence[str]) -> None:
        # without a Trainer files are not checked, unless indices must leave out damaged ones as under a Trainer
        wanted = self.trainer is not None or self.on_error == "skip"
        if "train" in splits and self.unlabelled is not None:
            splits = [*splits, "unlabelled"]
        real = [split for split in splits if not self.fake or split == "predict"]
        splits = [split for split in real if wanted and split not in self._checked]
        files = [path for split in splits for path in self._files(split)]
        root = str(self.predict) if "predict" in splits else self.root
        damaged = check_images(files, root, self.on_error, self.image_range, self.trainer) if splits else set()
        for split in splits if damaged else ():
            self._leave_out(split, damaged)
        self._checked = {*self._checked, *splits}

    def _leave_out(self, split: str, damaged: set[str]) -> None:
        indices, target = getattr(self, f"{split}_indices"), self._of(split, "target").numpy()
        is_whole = np.array([path not in damaged for path in self._files(split)], dtype=bool)
        kept = indices[is_whole]
        gone = np.setdiff1d(target[indices], target[kept])
        # a randomly drawn evaluation split may hold so few of a class that it is emptied by chance: no error then
        given = self._val_source == "val" if split == "val" else self._test_root() is not None
        must_hold_all = split == "train" or given
        if len(gone) and (must_hold_all or not len(kept)):
            emptied = f"class {self.class_names[gone[0]]!r} in split {split!r}" if len(kept) else f"split {split!r}"
            raise ValueError(
                f"no image of {emptied} can be read, so on_error='skip' leaves none: replace or remove them"
            )
        setattr(self, f"{split}_indices", kept)
        self._digest = None

    def _files(self, split: str) -> list[str]:
        paths = self._of(split, "image")
        return [paths[i] for i in getattr(self, f"{split}_indices")]

    def _of(self, split: str, what: str) -> Any:
        source = {"val": self._val_source, "unlabelled": "train"}.get(split, split)
        return getattr(self, f"{source}_{what}")

    def _load(self) -> None:
        super()._load()
        self._checked = set()  # the indices again contain the files that were left out

    def _split_root(self, split: str) -> Path | None:
        """``ROOT/SPLIT``, if the root has a folder ``train`` and this one; else ``None``."""
        path = Path(self.root) / split
        return path if (Path(self.root) / "train").is_dir() and path.is_dir() else None

    def _test_root(self) -> Path | None:
        return self._split_root("test") or self._split_root("val")
