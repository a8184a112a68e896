"""NUS-WIDE: photographs from Flickr with 81 concepts as labels."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_kd.core.notes import note
from lightning_kd.data.array_files import Arrays
from lightning_kd.data.multi_label_files import MultiLabelFilesDataModule, read_lines

__all__ = ["NUSWIDEDataModule"]


class NUSWIDEDataModule(MultiLabelFilesDataModule):
    """NUS-WIDE with its official split: up to 161,789 training and 107,859 test images of 81 concepts.

    Reads the lists of images ``ROOT/ImageList/Train*.txt`` and ``Test*.txt``, and for each concept a column of 0 and 1,
    ``Labels_CONCEPT_Train.txt`` and so on in ``ROOT/Groundtruth/TrainTestLabels``; concepts are sorted by these names.
    See ``MultiLabelFilesDataModule`` for how images are read and for further arguments. Truncated files are accepted,
    unless ``truncated`` is false.

    Args:
        root: the folder of the data set.
        images: the folder in ``root`` that the paths in the lists start from.
        keep_empty: keep images without any concept. Default: leave them out.
        missing: ``"skip"`` leaves out listed images that do not exist (many were deleted from Flickr), with a note;
            ``"raise"`` raises an error.
        truncated: accept truncated JPEG files; their missing part becomes grey.
        kwargs: see ``MultiLabelFilesDataModule``. The published protocols have no validation set: ``val_fraction=0``.

    Raises:
        ValueError: naming file and line, for lists that are damaged or inconsistent.
        FileNotFoundError, PermissionError: where a file does not exist or may not be read.
    """

    def __init__(
        self,
        root: str = "data/nus_wide",
        images: str = "Flickr",
        keep_empty: bool = False,
        missing: Literal["raise", "skip"] = "raise",
        truncated: bool = True,
        **kwargs: Any,
    ) -> None:
        if missing not in ("raise", "skip"):
            raise ValueError(f"missing must be 'raise' or 'skip', got {missing!r}: choose one")
        self.images = images
        self.keep_empty = keep_empty
        self.missing = missing
        folder = Path(root) / "Groundtruth" / "TrainTestLabels"
        if kwargs.get("fake") and not folder.is_dir():
            names = [f"concept_{c}" for c in range(81)]
        else:
            found = [re.fullmatch(r"Labels_(.+)_Train\.txt", path.name) for path in sorted(folder.glob("Labels_*"))]
            names = sorted(match[1] for match in found if match)
            if not names:
                raise FileNotFoundError(
                    f"{str(folder)!r} holds no Labels_CONCEPT_Train.txt: is root the folder of NUS-WIDE?"
                )
        super().__init__(class_names=names, root=root, truncated=truncated, **kwargs)

    def load_arrays(self) -> Arrays:
        return Arrays(*self._split("Train"), *self._split("Test"))

    def _split(self, split: str) -> tuple[list[str], Tensor]:
        root = Path(self.root)
        lists = sorted((root / "ImageList").glob(f"{split}*.txt"))
        if len(lists) != 1:
            raise FileNotFoundError(
                f"{str(root / 'ImageList')!r} must hold one {split}*.txt, got {[path.name for path in lists]}: is root "
                "the folder of NUS-WIDE?"
            )
        lines = read_lines(lists[0])
        # file names may contain blanks; the lists have Windows separators
        files = [str(root / self.images / " ".join(words).replace("\\", "/")) for _, words in lines]
        target = np.empty((len(files), self.num_classes), dtype=np.float32)
        for c, name in enumerate(self.class_names):
            path = root / "Groundtruth" / "TrainTestLabels" / f"Labels_{name}_{split}.txt"
            column = read_lines(path)
            for number, words in column:
                if words not in (["0"], ["1"]):
                    raise ValueError(
                        f"{str(path)!r}, line {number}: must be 0 or 1, got {' '.join(words)!r}: correct it"
                    )
            if len(column) != len(files):
                raise ValueError(
                    f"{str(path)!r} has {len(column)} labels, {str(lists[0])!r} {len(files)} images: replace the files"
                )
            target[:, c] = [int(words[0]) for _, words in column]
        kept = np.arange(len(files)) if self.keep_empty else np.flatnonzero(target.any(1))
        there = np.array([os.path.isfile(files[k]) for k in kept], dtype=bool)
        if not there.all():
            first = kept[~there][0]
            told = f"{(~there).sum()} of {len(kept)} images are missing"
            if self.missing == "raise" or not there.any():
                raise FileNotFoundError(
                    f"{str(lists[0])!r}, line {lines[first][0]}: {files[first]!r} does not exist ({told}): correct "
                    "images, or leave them out with missing='skip'"
                )
            note(f"{lists[0].name}: {told} and are left out")
            kept = kept[there]
        return [files[k] for k in kept], torch.from_numpy(target[kept])
