"""Reads samples without labels: image files from a folder or list, and arrays."""

from __future__ import annotations

import os
from pathlib import Path

from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from lightning_kd.data.array_files import read_arrays, to_feature, to_image
from lightning_kd.data.image_files import images_below
from lightning_kd.spreadsheet import column_name, read_rows

__all__ = ["files_to_predict", "is_array_file", "read_unlabelled"]


def is_array_file(given: str) -> bool:
    """Whether ``given`` is the name of an ``.npy`` or ``.npz`` file."""
    return given.lower().endswith((".npy", ".npz")) and not os.path.isdir(given)


def files_to_predict(given: str, argument: str = "predict") -> list[str]:
    """The image files that a folder, an image or a list stands for.

    Args:
        given: a folder of any depth; an image; or a list: a ``.txt`` with a path per line, or a ``.csv`` with paths in
            its column ``path``, else in its first column. Relative paths in a list start from the working directory or,
            if there is no such file, from the folder of the list.
        argument: name of the argument in error messages.

    Raises:
        FileNotFoundError: where the folder or file does not exist.
        ValueError: where there is no image.
    """
    path = Path(given)
    if given and path.is_dir():  # Path("") would be the working directory
        found = images_below(path)
    elif not given or not path.exists():
        raise FileNotFoundError(f"{argument} {given!r} does not exist: name a folder, an image, or a list of images")
    elif path.suffix.lower() in (".txt", ".csv"):
        found = [_resolve_listed(path.parent, name) for name in _listed(path, argument)]
    elif path.suffix.lower() in IMG_EXTENSIONS:
        found = [given]
    else:
        raise ValueError(
            f"{argument} {given!r} must be a folder, an image ({', '.join(IMG_EXTENSIONS)}) or a list (.txt, .csv): "
            "name one"
        )
    if not found:
        raise ValueError(f"{argument} {given!r} holds no image ({', '.join(IMG_EXTENSIONS)}): name another")
    return found


def _listed(path: Path, argument: str) -> list[str]:
    if path.suffix.lower() == ".csv":
        rows = [cells for _, cells in read_rows(path, argument)]
        header = [column_name(cell) for cell in rows[0]] if rows else []
        column = header.index("path") if "path" in header else 0
        rows = rows[1:] if "path" in header else rows
        return [cells[column] for cells in rows if len(cells) > column and cells[column]]
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{argument} {str(path)!r} is not text in UTF-8 ({error}): save it as UTF-8") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def _resolve_listed(folder: Path, name: str) -> str:
    beside = os.path.join(folder, name)
    return beside if os.path.exists(beside) and not os.path.exists(name) else name


def read_unlabelled(path: str, name: str) -> Tensor:
    """The samples in a ``.npy``, or in the array ``image`` or ``feature`` of an ``.npz``.

    Args:
        path: the array file.
        name: name of the argument in error messages.

    Returns:
        images uint8 ``[N, C, H, W]``, see ``to_image``, or features float32 ``[N, D]``, see ``to_feature``.

    Raises:
        FileNotFoundError, PermissionError, ValueError: as in ``read_arrays``, ``to_image`` and ``to_feature``, and
            where there is no sample.
    """
    arrays = read_arrays(Path(path), name)
    key = next((key for key in ("image", "feature", "") if key in arrays), None)
    if key is None:
        raise ValueError(f"{name} {path!r} must hold the array 'image' or 'feature', got {sorted(arrays)}: rename one")
    array = arrays[key]
    found = (to_feature if array.ndim == 2 else to_image)(array, f"{key or 'the array'} of {path!r}")
    if not len(found):
        raise ValueError(f"{name} {path!r} holds no sample: name another file")
    return found
