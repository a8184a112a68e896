"""Cityscapes: street scenes of 50 cities, with a class for each pixel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_kd.data.mask_files import MaskTable, find_pairs
from lightning_kd.data.segmentation_data import Pairs, SegmentationFilesDataModule

__all__ = ["CITYSCAPES_CLASSES", "CityscapesDataModule"]

# by the id in labelIds files, which hold the ids 0 to 33, and 255 for unlabelled pixels
CITYSCAPES_CLASSES = {
    7: "road",
    8: "sidewalk",
    11: "building",
    12: "wall",
    13: "fence",
    17: "pole",
    19: "traffic light",
    20: "traffic sign",
    21: "vegetation",
    22: "terrain",
    23: "sky",
    24: "person",
    25: "rider",
    26: "car",
    27: "truck",
    28: "bus",
    31: "train",
    32: "motorcycle",
    33: "bicycle",
}


class CityscapesDataModule(SegmentationFilesDataModule):
    """Cityscapes with fine annotations: 19 classes, 2,975 training images, tested on the 500 images of ``val``.

    Reads ``ROOT/leftImg8bit/SPLIT/CITY/NAME_leftImg8bit.png`` and ``ROOT/gtFine/SPLIT/CITY/NAME_gtFine_labelIds.png``;
    pixels of the other 15 ids are ignored. The labels of the official test set are not public. See
    ``SegmentationFilesDataModule`` for how files are read and for further arguments.

    Args:
        root: the folder of the data set.
        crop_size: height and width of training crops.
        kwargs: see ``SegmentationFilesDataModule``.

    Raises:
        ValueError: naming the file, where images and masks do not match.
        FileNotFoundError, PermissionError: where a file or folder does not exist or may not be read.
    """

    def __init__(
        self, root: str = "data/cityscapes", crop_size: tuple[int, int] | None = (512, 1024), **kwargs: Any
    ) -> None:
        self.root = root
        ids = dict.fromkeys([*range(34), 255], -1) | {value: k for k, value in enumerate(CITYSCAPES_CLASSES)}
        table = MaskTable(19, ignore=None, ids=ids)
        super().__init__(class_names=[*CITYSCAPES_CLASSES.values()], table=table, crop_size=crop_size, **kwargs)

    def image_folder(self) -> Path:
        return Path(self.root) / "leftImg8bit" / "train"

    def find_pairs(self, split: str) -> Pairs | None:
        if split == "test":
            return None
        images, masks = Path(self.root) / "leftImg8bit" / split, Path(self.root) / "gtFine" / split
        return find_pairs(images, masks, "_leftImg8bit", "_gtFine_labelIds")
