"""Data module for your own images with masks: a folder of images, and one of masks with the same names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_kd.argument_checks import check_numbers
from lightning_kd.data.arguments import names_of
from lightning_kd.data.mask_files import MaskTable, find_pairs, read_colours
from lightning_kd.data.segmentation_data import Pairs, SegmentationFilesDataModule

__all__ = ["SegmentationFolderDataModule"]


class SegmentationFolderDataModule(SegmentationFilesDataModule):
    """Your own images with masks: ``ROOT/images`` and ``ROOT/masks``, two trees of files with the same names.

    The mask of ``images/a/x.jpg`` is ``masks/a/x.png``: grey or palette values that are class indices, or colours. If
    ``images`` holds a folder ``train``, its folders ``train``, ``val`` and ``test`` are the splits (without ``test``,
    ``val`` is the test set); else test and validation set are random parts. See ``SegmentationFilesDataModule`` for how
    images are read and for further arguments.

    Args:
        root: the folder of the data set.
        images: folder of the images in ``root``.
        masks: folder of the masks in ``root``.
        class_names: the classes in the order of their indices, or their number. Default: those of ``colours``.
        colours: red, green and blue of each class, for masks in colours: ``{name: [r, g, b]}``, or a ``.csv`` of such
            lines. Grey masks have equal values, such as ``{no: [0, 0, 0], yes: [255, 255, 255]}`` for 0 and 255. With
            ``class_names``, other colours of the table are ignored.
        ignore: mask value, or colour, of ignored pixels; ``null`` for none. Default: 255, or none with ``colours``.
        kwargs: see ``SegmentationFilesDataModule``.

    Raises:
        ValueError: without both ``class_names`` and ``colours``; and naming the file, for a mask with other values.
        FileNotFoundError, PermissionError: where a file or folder does not exist or may not be read.
    """

    def __init__(
        self,
        root: str,
        images: str = "images",
        masks: str = "masks",
        class_names: Sequence[str | int] | int | None = None,
        colours: str | dict[str, list[int]] | None = None,
        ignore: int | list[int] | None = 255,
        **kwargs: Any,
    ) -> None:
        self.root = root
        self._image_root, self._mask_root = Path(root) / images, Path(root) / masks
        self.images, self.masks, self.colours, self.ignore = images, masks, colours, ignore
        found = None if colours is None else read_colours(colours)
        if isinstance(class_names, int):
            check_numbers(least=2, whole=True, class_names=class_names)
            names = [str(k) for k in range(class_names)]
        elif (given := names_of(class_names)) is not None:
            names = given
        elif found is not None:
            names = [*found]
        elif kwargs.get("fake"):
            names = [f"class_{k}" for k in range(10)]
        else:
            raise ValueError(
                "class_names must say which classes the masks have, got None: give their names in the order of their "
                "ids, how many there are, or a table of colours"
            )
        if found is None:
            table = MaskTable(len(names), ignore=ignore)
        else:
            if lacking := [name for name in names if name not in found]:
                raise ValueError(f"class_names has {lacking[0]!r}, which has no colour in the table: correct one")
            others = [colour for name, colour in found.items() if name not in names]
            ignored = None if ignore == 255 else ignore
            table = MaskTable(len(names), ignore=ignored, colours=[found[name] for name in names], others=others)
        super().__init__(class_names=names, table=table, **kwargs)

    def image_folder(self) -> Path:
        return self._image_root / "train" if (self._image_root / "train").is_dir() else self._image_root

    def find_pairs(self, split: str) -> Pairs | None:
        if not (self._image_root / "train").is_dir():
            return find_pairs(self._image_root, self._mask_root) if split == "train" else None
        folder = self._image_root / split
        return find_pairs(folder, self._mask_root / split) if folder.is_dir() else None
