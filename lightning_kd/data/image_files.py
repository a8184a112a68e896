"""Finds image files in folders, and reads image files of any format and mode as 8-bit RGB."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from PIL import ExifTags, Image, ImageCms, ImageFile
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

__all__ = [
    "as_rgb",
    "class_folders",
    "find_images",
    "images_below",
    "read_image",
    "truncated_allowed",
    "upright",
    "without_range",
]

# the transposition that turns an image upright, by its EXIF orientation; 1 is upright already
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_image(
    path: str | Path, background: Sequence[int] = (255, 255, 255), image_range: Sequence[float] | None = None
) -> Image.Image:
    """Read an image file as 8-bit RGB, turned upright by its EXIF orientation.

    Transparent pixels show ``background``. 16-bit grey values are scaled from 0..65535, or from ``image_range``. Float
    and 32-bit integer images have no fixed range and need ``image_range``.

    Args:
        path: the image file.
        background: red, green and blue, 0 to 255. Default: white.
        image_range: the two pixel values that become black and white, for images of more than 8 bits.

    Raises:
        ValueError: naming the file, where it cannot be read, or needs an ``image_range``.
    """
    try:
        with Image.open(path) as file:
            rangeless = without_range(file)
            image = upright(file)
    except Exception as error:  # whatever a damaged file makes the decoder raise
        raise ValueError(f"the image {str(path)!r} cannot be read ({error}): replace or remove it") from error
    return as_rgb(image, repr(str(path)), background, image_range, rangeless)


def as_rgb(
    image: Image.Image,
    name: str = "given",
    background: Sequence[int] = (255, 255, 255),
    image_range: Sequence[float] | None = None,
    rangeless: str | None = None,
) -> Image.Image:
    """Convert an image to 8-bit RGB, see ``read_image``.

    Args:
        image: an image of any mode.
        name: name of the image in error messages.
        background: see ``read_image``.
        image_range: see ``read_image``.
        rangeless: what ``without_range`` returned for the opened file, if known. Default: ``without_range(image)``.

    Raises:
        ValueError: where the image needs an ``image_range``.
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        rangeless = without_range(image) if rangeless is None else rangeless
        if image_range is None and rangeless:
            raise ValueError(f"the image {name} {rangeless}")
        low, high = image_range or (0, 65535)
        values = np.nan_to_num((np.asarray(image).astype(np.float64) - low) / (high - low)).clip(0, 1)
        return Image.fromarray(np.round(values * 255).astype(np.uint8)).convert("RGB")
    if image.mode == "LAB":
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, *profiles, outputMode="RGB")
        assert converted is not None
        return converted
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        if image.mode in ("La", "RGBa"):
            image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, (*background, 255))  # type: ignore[arg-type]
        return Image.alpha_composite(ground, image).convert("RGB")
    return image.convert("RGB")


@contextmanager
def truncated_allowed(allowed: bool = True) -> Iterator[None]:
    """Let Pillow read truncated image files in this block (what is missing is grey), in the whole process."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = allowed or before
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def without_range(image: Image.Image) -> str:
    """Why an opened image needs an ``image_range``, as part of an error message; empty if it does not."""
    # Pillow opens 16-bit PNG and PGM files with the 32-bit mode "I"; their values are 0 to 65535
    if image.mode != "F" and (image.mode != "I" or image.format in ("PNG", "PPM")):
        return ""
    kind = "floats" if image.mode == "F" else "32-bit integers"
    return f"holds {kind}, which have no fixed range: give image_range, the two values that become black and white"


def upright(image: Image.Image) -> Image.Image:
    """The pixels of an opened image, turned by its EXIF orientation; not turned where the EXIF cannot be read.

    Not ``ImageOps.exif_transpose``: it rewrites the EXIF, which fails for tags that Pillow can read but not write.
    """
    if image.format == "TIFF":  # Pillow turns these while loading, and raises there if the EXIF is broken
        with suppress(Exception):
            image.getexif()  # the first read raises, later ones do not
    if isinstance(image, ImageFile.ImageFile):
        # with a file name Pillow memory-maps the file and swaps width and height of a TIFF that has to be turned
        name, image.filename = image.filename, ""
        image.load()
        image.filename = name
    turn = None
    with suppress(Exception):  # whatever a broken EXIF makes Pillow raise
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    return image.copy() if turn is None else image.transpose(turn)


def class_folders(root: Path) -> list[str]:
    """The names of the folders in ``root``, sorted; hidden folders and links to a parent of ``root`` are skipped.

    Raises:
        FileNotFoundError, PermissionError, ValueError: where ``root`` is not a folder, cannot be read, or has no
            subfolder.
    """
    try:
        outside = _with_parents(root)
        names = sorted(
            entry.name
            for entry in os.scandir(root)
            if _is_folder(entry) and not entry.name.startswith(".") and _identity(entry.path) not in outside
        )
    except PermissionError:
        raise PermissionError(f"root {str(root)!r} may not be read: check its permissions") from None
    except OSError:
        raise FileNotFoundError(f"root {str(root)!r} is not a folder: give the folder of the class folders") from None
    if not names:
        raise ValueError(f"root {str(root)!r} holds no class folders: put the images of each class into a folder there")
    return names


def find_images(root: Path, class_names: list[str]) -> tuple[list[str], Tensor]:
    """The image files below each class folder of ``root``, sorted, and their class indices, int64 ``[N]``.

    Files are found as by ``images_below``, with one warning for all classes.

    Raises:
        PermissionError: where a folder cannot be read.
        ValueError: where a folder is not one of ``class_names``, or holds no image.
    """

    paths: list[str] = []
    target: list[int] = []
    others: list[str] = []
    for name in class_folders(root):
        if name not in class_names:
            raise ValueError(f"{str(root)!r} holds {name!r}, which is not a class folder of train: remove or rename it")
        found, no_images = _images_and_others(root / name)
        if not found:
            raise ValueError(
                f"class folder {str(root / name)!r} holds no image ({', '.join(IMG_EXTENSIONS)}): add some or remove it"
            )
        paths += found
        target += [class_names.index(name)] * len(found)
        others += no_images
    _warn_of_others(root, others, len(paths) + len(others))
    return paths, torch.tensor(target)


def images_below(root: Path, known: Sequence[Path] = (), argument: str = "root") -> list[str]:
    """The image files anywhere below ``root``, sorted; hidden files are skipped.

    Links to folders are followed, except those to a parent folder. A warning counts the other files by suffix, without
    those in ``known``. Messages call the folder ``argument``.

    Raises:
        FileNotFoundError, PermissionError: where ``root`` is not a folder, or a folder cannot be read.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{argument} {str(root)!r} is not a folder: give the folder of the images")
    found, others = _images_and_others(root)
    expected = {os.path.realpath(path) for path in known}
    others = [path for path in others if os.path.realpath(path) not in expected]
    _warn_of_others(root, others, len(found) + len(others))
    return found


def _images_and_others(root: Path) -> tuple[list[str], list[str]]:
    files = _files_below(str(root), _with_parents(root.resolve().parent))
    found = sorted(file for file in files if file.lower().endswith(IMG_EXTENSIONS))
    return found, [*({*files} - {*found})]


def _warn_of_others(root: Path, others: list[str], count: int) -> None:
    if others:
        endings = Counter(Path(file).suffix.lower() or "no ending" for file in others)
        kinds = ", ".join(f"{number} x {ending}" for ending, number in endings.most_common(8))
        rank_zero_warn(
            f"{str(root)!r}: {len(others)} of {count} files are left out ({kinds}): images must end in "
            f"{', '.join(IMG_EXTENSIONS)}; convert the others"
        )


def _files_below(folder: str, above: frozenset[tuple[int, int]]) -> list[str]:
    """The files below ``folder``; none if a link has led back to one of the folders ``above``."""
    try:
        identity = _identity(folder)
        if identity in above:
            return []
        with os.scandir(folder) as entries:
            found = [(entry.path, _is_folder(entry), entry.name[0] == ".") for entry in entries]
    except OSError as error:
        raise PermissionError(f"folder {folder!r} cannot be read ({error}): check its permissions") from error
    files = [path for path, is_folder, hidden in found if not is_folder and not hidden]
    for path, is_folder, _ in found:
        if is_folder:
            files += _files_below(path, above | {identity})
    return files


def _is_folder(entry: os.DirEntry[str]) -> bool:
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()  # a cyclic link is not a folder


def _with_parents(folder: Path) -> frozenset[tuple[int, int]]:
    real = folder.resolve()
    return frozenset(_identity(path) for path in (real, *real.parents))


def _identity(folder: str | Path) -> tuple[int, int]:
    found = os.stat(folder)
    return found.st_dev, found.st_ino
