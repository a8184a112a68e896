"""Pascal VOC as a multi-label data set."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_kd.core.notes import note
from lightning_kd.data.array_files import Arrays
from lightning_kd.data.multi_label_files import MultiLabelFilesDataModule, read_lines

__all__ = ["VOC_CLASSES", "VOCDataModule"]

VOC_CLASSES = """
aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant sheep sofa
train tvmonitor
""".split()  # noqa: SIM905

SPLITS = {2007: ("trainval", "test"), 2012: ("train", "val")}


class VOCDataModule(MultiLabelFilesDataModule):
    """Pascal VOC 2007 (trainval, tested on test) or 2012 (train, tested on val), with 20 classes.

    Reads ``ImageSets/Main/CLASS_SPLIT.txt`` and ``JPEGImages`` in ``ROOT/VOCdevkit/VOCYEAR``, ``ROOT/VOCYEAR`` or
    ``ROOT``. The lists mark each image with 1 (the class is present), -1 (absent) or 0 (only difficult objects). 2007
    has 5,011 and 4,952 images, 2012 has 5,717 and 5,823. The XML annotations are not read; papers that use them count
    difficult objects as present. See ``MultiLabelFilesDataModule`` for how images are read and for further arguments.

    Args:
        root: the folder of the data set.
        year: 2007 or 2012.
        difficult: meaning of 0: ``"negative"``, as in the papers' code, or ``"ignore"`` (unknown), as in the official
            evaluation of 2007.
        keep_empty: keep images without any 1. Default: leave them out, as the papers' scripts do.
        kwargs: see ``MultiLabelFilesDataModule``. The published protocols have no validation set: ``val_fraction=0``.

    Raises:
        ValueError: naming file and line, for lists that are damaged or inconsistent.
        FileNotFoundError, PermissionError: where a file does not exist or may not be read.
    """

    def __init__(
        self,
        root: str = "data",
        year: Literal[2007, 2012] = 2012,
        difficult: Literal["negative", "ignore"] = "negative",
        keep_empty: bool = False,
        **kwargs: Any,
    ) -> None:
        if year not in SPLITS:
            raise ValueError(f"year must be 2007 or 2012, got {year!r}: choose one")
        if difficult not in ("negative", "ignore"):
            raise ValueError(f"difficult must be 'negative' or 'ignore', got {difficult!r}: choose one")
        self.year = year
        self.difficult = difficult
        self.keep_empty = keep_empty
        super().__init__(class_names=VOC_CLASSES, root=root, **kwargs)

    def load_arrays(self) -> Arrays:
        train, test = SPLITS[self.year]
        return Arrays(*self._split(train), *self._split(test))

    def _split(self, split: str) -> tuple[list[str], Tensor]:
        name = f"VOC{self.year}"
        places = [Path(self.root) / "VOCdevkit" / name, Path(self.root) / name, Path(self.root)]
        home = next((place for place in places if (place / "ImageSets" / "Main").is_dir()), None)
        if home is None:
            raise FileNotFoundError(
                f"root {self.root!r} holds no {name}/ImageSets/Main: give the folder that VOCdevkit or {name} is in"
            )
        ids: list[str] = []
        columns = []
        for number, class_name in enumerate(VOC_CLASSES):
            path = home / "ImageSets" / "Main" / f"{class_name}_{split}.txt"
            labels = read_label_list(path)
            if not number:
                ids = list(labels)
            elif labels.keys() != {*ids}:
                odd = sorted(labels.keys() ^ {*ids})[0]
                raise ValueError(
                    f"{str(path)!r} and the list of {VOC_CLASSES[0]} have different images, {odd!r} is in only one of "
                    "them: replace the files"
                )
            columns.append([labels[image] for image in ids])
        given = np.array(columns, dtype=np.int8).T
        unclear = 0 if self.difficult == "negative" else -1
        target = torch.from_numpy(np.where(given == 1, 1, np.where(given == 0, unclear, 0))).float()
        kept = torch.arange(len(ids)) if self.keep_empty else (target == 1).any(1).nonzero()[:, 0]
        if len(kept) < len(ids):
            note(f"{name} {split}: {len(ids) - len(kept)} of {len(ids)} images have no label and are left out")
        return [str(home / "JPEGImages" / f"{ids[k]}.jpg") for k in kept.tolist()], target[kept]


def read_label_list(path: Path) -> dict[str, int]:
    """The label (1, 0 or -1) of each image in a list ``ImageSets/Main/CLASS_SPLIT.txt``.

    Raises:
        FileNotFoundError, PermissionError, ValueError: where it cannot be read, or, naming the line, for anything else
            in it.
    """
    found: dict[str, int] = {}
    for number, words in read_lines(path):
        if len(words) != 2 or words[1] not in ("1", "0", "-1"):
            raise ValueError(
                f"{str(path)!r}, line {number}: must be an image and -1, 0 or 1, got {' '.join(words)!r}: correct it"
            )
        if found.get(words[0], int(words[1])) != int(words[1]):
            raise ValueError(f"{str(path)!r}, line {number}: image {words[0]!r} has another label above: correct it")
        found[words[0]] = int(words[1])
    if not found:
        raise ValueError(f"{str(path)!r} holds no image: replace it")
    return found
