"""Finding image files in folders, and reading those of any kind."""

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

# what stands an image upright, by the orientation that its EXIF names; 1 is upright
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
    """An image file as 8-bit RGB, upright as its EXIF orientation says.

    What is transparent shows ``background``. Grey values of 16 bits are scaled by their range, 0 to 65535, or by
    ``image_range``. Floats and integers of 32 bits have no range of their own and need one.

    Args:
        path: the file.
        background: red, green and blue, 0 to 255.
        image_range: the values that become black and white, in images of more than 8 bits.

    Raises:
        ValueError: naming the file, where it cannot be read, or where its values need an ``image_range``.
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
    """An image as 8-bit RGB, see ``read_image``.

    Args:
        image: of any mode.
        name: what to call it in errors.
        background: see ``read_image``, as ``image_range``.
        image_range: likewise.
        rangeless: see ``without_range``, where the file that it is from is known; by default asked of ``image``.

    Raises:
        ValueError: where its values need an ``image_range``.
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
    """Whether image files may be cut off meanwhile (what is missing is grey); in the whole process."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = allowed or before
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def without_range(image: Image.Image) -> str:
    """What an image, as it was opened, holds that has no range of its own, and what to do; empty where it has one."""
    # what Pillow reads as integers of 32 bits are 16 bits in a PNG, and scaled to 16 bits in a PGM
    if image.mode != "F" and (image.mode != "I" or image.format in ("PNG", "PPM")):
        return ""
    kind = "floats" if image.mode == "F" else "integers of 32 bits"
    return f"holds {kind}, which have no range of their own: give image_range, the values that become black and white"


def upright(image: Image.Image) -> Image.Image:
    """The pixels of an opened image, turned as its EXIF orientation says; not turned where the EXIF is broken.

    ``ImageOps.exif_transpose`` writes the EXIF anew, which fails on tags that Pillow reads but cannot write.
    """
    if image.format == "TIFF":  # turned as it is loaded
        with suppress(Exception):
            image.getexif()  # what fails here would fail there, but only once
    if isinstance(image, ImageFile.ImageFile):
        name, image.filename = image.filename, ""  # or Pillow maps the file, and takes width for height in a TIFF
        image.load()  # that is to be turned
        image.filename = name
    turn = None
    with suppress(Exception):  # whatever a broken EXIF makes Pillow raise
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    return image.copy() if turn is None else image.transpose(turn)


def class_folders(root: Path) -> list[str]:
    """The names of the folders in ``root``, in alphabetical order; links to a folder that ``root`` is in are none.

    Raises:
        FileNotFoundError, PermissionError, ValueError: where ``root`` cannot be listed, or holds no folder.
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
        raise FileNotFoundError(f"root {str(root)!r} is no folder: give the folder that holds the classes") from None
    if not names:
        raise ValueError(f"root {str(root)!r} holds no class folders: put the images of each class into a folder there")
    return names


def find_images(root: Path, class_names: list[str]) -> tuple[list[str], Tensor]:
    """The image files below each class folder of ``root``, sorted, and their classes, int64 ``[N]``.

    As with ``images_below``, with one warning for all classes.

    Raises:
        PermissionError: where a folder cannot be read.
        ValueError: where a folder is none of the classes, or holds no image.
    """

    paths: list[str] = []
    target: list[int] = []
    others: list[str] = []
    for name in class_folders(root):
        if name not in class_names:
            raise ValueError(f"{str(root)!r} holds {name!r}, which is no class folder of train: remove or rename it")
        found, no_images = _images_and_others(root / name)
        if not found:
            raise ValueError(
                f"class folder {str(root / name)!r} holds no image ({', '.join(IMG_EXTENSIONS)}): add some or remove it"
            )
        paths += found
        target += [class_names.index(name)] * len(found)
        others += no_images
    _tell_others(root, others, len(paths) + len(others))
    return paths, torch.tensor(target)


def images_below(root: Path, known: Sequence[Path] = ()) -> list[str]:
    """The image files anywhere below ``root``, sorted; those that start with a dot are left alone.

    Links to folders are followed, but for those that lead back to a folder that they are in. How many other files
    there are, by their endings, is told in a warning; those in ``known`` aside.

    Raises:
        FileNotFoundError, PermissionError: where there is no such folder, or one cannot be read.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{str(root)!r} is no folder: name the one that holds the images")
    found, others = _images_and_others(root)
    expected = {os.path.realpath(path) for path in known}
    others = [path for path in others if os.path.realpath(path) not in expected]
    _tell_others(root, others, len(found) + len(others))
    return found


def _images_and_others(root: Path) -> tuple[list[str], list[str]]:
    files = _files_below(str(root), _with_parents(root.resolve().parent))
    found = sorted(file for file in files if file.lower().endswith(IMG_EXTENSIONS))
    return found, [*({*files} - {*found})]


def _tell_others(root: Path, others: list[str], count: int) -> None:
    if others:
        endings = Counter(Path(file).suffix.lower() or "no ending" for file in others)
        kinds = ", ".join(f"{number} x {ending}" for ending, number in endings.most_common(8))
        rank_zero_warn(
            f"{str(root)!r}: {len(others)} of {count} files are left out ({kinds}): images end in "
            f"{', '.join(IMG_EXTENSIONS)}; convert others"
        )


def _files_below(folder: str, above: frozenset[tuple[int, int]]) -> list[str]:
    """The files below ``folder``, unless it is one of those ``above`` it, as a link can make it."""
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
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()  # a link may lead in a circle


def _with_parents(folder: Path) -> frozenset[tuple[int, int]]:
    real = folder.resolve()
    return frozenset(_identity(path) for path in (real, *real.parents))


def _identity(folder: str | Path) -> tuple[int, int]:
    found = os.stat(folder)
    return found.st_dev, found.st_ino
