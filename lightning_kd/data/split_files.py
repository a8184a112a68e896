"""Splits whose samples are image files below a root, and leaving out of them what is damaged."""

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
    """A data module of image files, each of which is looked at before its split is used.

    Attributes:
        root: the folder of the labelled ones, with or without ``train``, ``val`` and ``test``.
        on_error: ``"raise"`` or ``"skip"``, see ``check_images``.
        image_range: see ``read_image``.
    """

    root: str
    on_error: str
    image_range: tuple[float, float] | None
    _checked: set[str]  # splits whose files were looked at

    def setup(self, stage: str | None = None) -> None:
        """Load and split the data, once, and look at the image files of the splits that the stage uses."""
        super().setup(stage)
        self._check(self._splits_of(stage))

    def _splits_of(self, stage: str | None) -> Sequence[str]:
        if self._only_new(stage):
            return ("predict",)
        return SPLITS_OF.get(stage or "", ()) if self.trainer is not None else ("train", "val", "test")

    def check_files(self, *splits: str) -> None:
        """Look at the image files of some splits, once; without a Trainer only to leave out damaged ones.

        Raises:
            ValueError: where some cannot be read, or leaving them out would leave a split or a class without images.
        """
        self.setup("predict" if splits == ("predict",) else None)
        self._check(splits)

    def _check(self, splits: Sequence[str]) -> None:
        # without a Trainer somebody only looks around; but what is skipped must be so everywhere
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
        # of a class in a drawn evaluation split there may be so few that chance alone takes them
        told = split == "train" or (self._val_source == "val" if split == "val" else self._test_root() is not None)
        if len(gone) and (told or not len(kept)):
            emptied = f"class {self.class_names[gone[0]]!r} in split {split!r}" if len(kept) else f"split {split!r}"
            raise ValueError(
                f"no image of {emptied} can be read, so that on_error='skip' leaves none: replace or remove them"
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
        self._checked = set()  # all are back

    def _split_root(self, split: str) -> Path | None:
        """``ROOT/SPLIT`` where the root is divided into splits and has that one."""
        path = Path(self.root) / split
        return path if (Path(self.root) / "train").is_dir() and path.is_dir() else None

    def _test_root(self) -> Path | None:
        return self._split_root("test") or self._split_root("val")
