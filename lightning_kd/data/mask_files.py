"""Masks in files, which hold a class for each pixel: pairs of image and mask, and the meaning of mask values."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.notes import note
from lightning_kd.data.image_files import images_below
from lightning_kd.spreadsheet import column_name, read_rows

__all__ = ["MaskTable", "find_pairs", "picture_size", "read_colours"]

_UNKNOWN = -2
_GREY = ("1", "L", "P", "I")


class MaskTable:
    """Maps the values of masks to class indices, and to -1 for ignored pixels.

    A mask is grey or has a palette, and its values are ids; or it is in colours.

    Args:
        num_classes: number of classes ``C``.
        ignore: the id, or red, green and blue, of ignored pixels; ``None`` for none.
        ids: class index of each id, -1 to ignore it. Default: ids are class indices.
        colours: red, green and blue of each class, for masks in colours.
        others: further colours to ignore.

    Raises:
        ValueError: for a number out of range, or an ``ignore`` that does not match the other arguments.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        ignore: int | Sequence[int] | None = 255,
        ids: Mapping[int, int] | None = None,
        colours: Sequence[Sequence[int]] | None = None,
        others: Sequence[Sequence[int]] = (),
    ) -> None:
        self.num_classes = num_classes
        self.ignore = ignore
        self.in_colours = colours is not None
        if colours is not None:
            ignored = [*others, *([] if ignore is None or isinstance(ignore, int) else [ignore])]
            codes = [_code(colour) for colour in [*colours, *ignored]]
            classes = [*range(len(colours)), *[-1] * len(ignored)]
            if len({*codes[: len(colours)]}) < len(colours) or {*codes[: len(colours)]} & {*codes[len(colours) :]}:
                raise ValueError("colours must all differ, also from ignored colours: correct the table")
            order = np.argsort(codes)
            self._codes, self._classes = np.array(codes)[order], np.array(classes, dtype=np.int16)[order]
            return
        if ignore is not None and not isinstance(ignore, int):
            raise ValueError(f"ignore must be an id where masks hold ids, got {ignore}: give colours, or an id")
        check_numbers(least=0, most=65535, whole=True, optional=True, ignore=ignore)
        self._lookup = np.full(65536, _UNKNOWN, dtype=np.int16)
        self._lookup[:num_classes] = np.arange(num_classes)
        if ids is not None:
            self._lookup[:num_classes] = _UNKNOWN
            for value, number in ids.items():
                self._lookup[value] = number
        if ignore is not None:
            if ids is None and ignore < num_classes:
                raise ValueError(
                    f"ignore={ignore} is the id of one of the {num_classes} classes: give another, or None"
                )
            self._lookup[ignore] = -1

    def read(self, path: str, size: Sequence[int] | None = None) -> Tensor:
        """Read a mask, int16 ``[H, W]`` of class indices and -1.

        Args:
            path: the mask file.
            size: height and width to resize it to (nearest neighbour). Default: no resizing.

        Raises:
            ValueError: naming the file, where it cannot be read, or holds a value that is not a class.
        """
        try:
            with Image.open(path) as file:
                mask = file.copy()
        except Exception as error:  # whatever a damaged file makes the decoder raise
            raise ValueError(f"the mask {path!r} cannot be read ({error}): replace or remove it") from error
        grey = mask.mode in _GREY or mask.mode.startswith("I;16")
        if not self.in_colours and not grey:
            raise ValueError(
                f"the mask {path!r} is in colours ({mask.mode}), not of class ids: give a table of colours"
            )
        mask = mask.convert("RGB") if self.in_colours else mask
        if size is not None and (mask.height, mask.width) != tuple(size):
            mask = mask.resize((size[1], size[0]), Image.Resampling.NEAREST)
        return torch.from_numpy(self._mapped(np.asarray(mask), path))

    def tell_of_one_class(self, masks: Iterable[Tensor], names: Sequence[str]) -> None:
        """Print a note if all of some masks, int16 ``[H, W]`` each, together hold fewer than two classes."""
        found: set[int] = set()
        for count, mask in enumerate(masks, 1):  # noqa: B007  used below
            found |= {*mask.unique().tolist()} - {-1}
            if len(found) > 1:  # mostly after the first mask
                return
        what = (
            f"all labelled pixels of {count} training masks are of class {names[found.pop()]!r}"
            if found
            else (f"no pixel of {count} training masks is labelled")
        )
        hint = "" if self.in_colours or self.ignore is None else (
            f"; the value {self.ignore} is ignored: if it is a class, give colours, as {{{names[0]}: [0, 0, 0], "
            f"{names[-1]}: [{', '.join([str(self.ignore)] * 3)}]}}, which also work for grey masks"
        )  # fmt: skip
        note(f"{what}: a network has nothing to learn from them{hint}")

    def _mapped(self, values: np.ndarray, path: str) -> np.ndarray:
        if self.in_colours:
            values = values.astype(np.int64) @ np.array([65536, 256, 1])
            place = np.searchsorted(self._codes, values).clip(max=len(self._codes) - 1)
            found = np.where(self._codes[place] == values, self._classes[place], _UNKNOWN).astype(np.int16)
        else:
            wide = values.astype(np.int64)
            found = self._lookup[wide.clip(0, 65535)]
            found = np.where(wide == wide.clip(0, 65535), found, _UNKNOWN).astype(np.int16)
        if (found == _UNKNOWN).any():
            odd = int(values[found == _UNKNOWN][0])
            if self.in_colours:
                colour = [odd >> 16, odd >> 8 & 255, odd & 255]
                raise ValueError(f"the mask {path!r} holds the colour {colour}, which is not in the table: add it")
            raise ValueError(
                f"the mask {path!r} holds the value {odd}, which is none of the {self.num_classes} classes and not "
                f"ignore={self.ignore}: correct the mask, class_names or ignore"
            )
        return found


def _code(colour: Sequence[int]) -> int:
    if isinstance(colour, str) or len(colour) != 3:
        raise ValueError(f"a colour must be red, green and blue, got {colour!r}: give three numbers from 0 to 255")
    for value in colour:
        check_numbers(least=0, most=255, whole=True, colours=value)
    red, green, blue = colour
    return int(red) << 16 | int(green) << 8 | int(blue)


def read_colours(table: str | Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """Red, green and blue of each class by its name, in the order of the table.

    Args:
        table: such a mapping; or a ``.csv`` with a line for each class and the columns ``name``, ``r``, ``g``, ``b``,
            or four columns in that order without a header.

    Raises:
        FileNotFoundError, PermissionError: where the file does not exist, or may not be read.
        ValueError: naming the line, where it holds something else.
    """
    if not isinstance(table, str):
        return {str(name): list(colour) for name, colour in table.items()}
    found: dict[str, list[int]] = {}
    for number, cells in read_rows(Path(table), "colours"):
        if not found and [column_name(cell) for cell in cells[1:4]] == ["r", "g", "b"]:
            continue
        numbers = [cell.strip() for cell in cells[1:4]]
        if len(numbers) != 3 or not all(cell.isdecimal() and int(cell) < 256 for cell in numbers):
            raise ValueError(
                f"{table!r}, line {number}: must be a name and three numbers from 0 to 255, got {', '.join(cells)}: "
                "correct it"
            )
        if cells[0] in found:
            raise ValueError(f"{table!r}, line {number}: {cells[0]!r} has an earlier line too: remove one")
        found[cells[0]] = [int(cell) for cell in numbers]
    if not found:
        raise ValueError(f"{table!r} holds no class: give a line for each, with a name and red, green and blue")
    return found


def find_pairs(
    images: Path, masks: Path, image_end: str = "", mask_end: str = "", what: str = "root"
) -> tuple[list[str], list[str]]:
    """The images anywhere below a folder, sorted, and for each the mask of the same name in another folder.

    Args:
        images: the folder of the images.
        masks: the folder of the masks; a mask has the relative path of its image, with any suffix.
        image_end: end of the image names, before the suffix, that mask names lack.
        mask_end: likewise the end of mask names; other files are not masks.
        what: the argument that names the folders, for error messages.

    Raises:
        FileNotFoundError: where a folder does not exist, or an image has no mask.
        ValueError: where a folder holds no image, or an image has two masks.
    """
    for folder in (images, masks):
        if not folder.is_dir():
            raise FileNotFoundError(f"{what} must hold images and masks, but {str(folder)!r} is no folder: correct it")
    by_name: dict[str, str] = {}
    for path in images_below(masks):
        name = os.path.splitext(os.path.relpath(path, masks))[0]
        if not name.endswith(mask_end):
            continue
        if name in by_name:
            raise ValueError(f"{path!r} and {by_name[name]!r} are masks with the same name: remove one")
        by_name[name.removesuffix(mask_end)] = path
    found: list[str] = []
    for path in images_below(images):
        name = os.path.splitext(os.path.relpath(path, images))[0].removesuffix(image_end)
        if name not in by_name:
            raise FileNotFoundError(
                f"the image {path!r} has no mask {masks / (name + mask_end)!s}.png: add it, or remove the image"
            )
        found.append(path)
    if not found:
        raise ValueError(f"{str(images)!r} holds no image: give a folder that does")
    names = [os.path.splitext(os.path.relpath(path, images))[0].removesuffix(image_end) for path in found]
    if len(by_name) > len({*names}):
        note(f"{masks}: {len(by_name) - len({*names})} of {len(by_name)} masks have no image and are left out")
    return found, [by_name[name] for name in names]


def picture_size(path: str, turned: bool = True) -> tuple[int, int]:
    """Height and width of an image file, read from its header only.

    Args:
        path: the file.
        turned: apply the EXIF orientation, as ``read_image`` does.

    Raises:
        ValueError: naming the file, where it cannot be read.
    """
    try:
        with Image.open(path) as file:
            width, height = file.size
            orientation: Any = file.getexif().get(ExifTags.Base.Orientation, 1) if turned else 1
    except Exception as error:  # whatever a damaged file makes the decoder raise
        raise ValueError(f"the image {path!r} cannot be read ({error}): replace or remove it") from error
    return (width, height) if orientation in (5, 6, 7, 8) else (height, width)
