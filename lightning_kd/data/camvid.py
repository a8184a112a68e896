"""CamVid: street scenes filmed from a car, with a class for each pixel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_kd.data.mask_files import MaskTable, find_pairs
from lightning_kd.data.segmentation_data import Pairs, SegmentationFilesDataModule

__all__ = ["CAMVID_CLASSES", "CamVidDataModule"]

CAMVID_CLASSES = "sky building pole road pavement tree sign fence car pedestrian bicyclist".split()  # noqa: SIM905


class CamVidDataModule(SegmentationFilesDataModule):
    """CamVid as in most papers on segmentation: 11 classes; 367, 101 and 233 images; void pixels are ignored.

    Reads images from ``ROOT/train``, ``val`` and ``test``, and masks of the same names from ``trainannot``,
    ``valannot`` and ``testannot``: PNG files with class indices 0 to 10, and 11 for void. See
    ``SegmentationFilesDataModule`` for how they are read and for further arguments.

    Args:
        root: the folder of the data set.
        kwargs: see ``SegmentationFilesDataModule``.

    Raises:
        ValueError: naming the file, where images and masks do not match.
        FileNotFoundError, PermissionError: where a file or folder does not exist or may not be read.
    """

    def __init__(self, root: str = "data/camvid", **kwargs: Any) -> None:
        self.root = root
        super().__init__(class_names=CAMVID_CLASSES, table=MaskTable(11, ignore=11), **kwargs)

    def image_folder(self) -> Path:
        return Path(self.root) / "train"

    def find_pairs(self, split: str) -> Pairs | None:
        return find_pairs(Path(self.root) / split, Path(self.root) / f"{split}annot")
