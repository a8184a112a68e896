"""Digests of a data set, which checkpoints store to recognise the data that they were trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

__all__ = ["data_digest", "image_digest"]

# number of pixels per image, and of images, that are hashed: reading all of a large file would take minutes
PIXELS, IMAGES = 16, 200_000
# number of images hashed at once, and of files whose content is hashed
ROWS, FILES = 1024, 1000


def data_digest(image: Tensor | Sequence[Any], target: Tensor, indices: np.ndarray) -> str:
    """A sha256 of the training samples, their order and their labels, on which stored values per sample depend.

    Images are compared by a few of their pixels, image files by their names and those of their folders.

    Args:
        image: the training images ``[N, ...]``, or the paths of their files.
        target: ``[N, ...]``, the labels.
        indices: int64 ``[n]``, positions of the samples in use.

    Returns:
        the digest in hexadecimal.
    """
    found = hashlib.sha256(np.ascontiguousarray(target.numpy()).tobytes())
    found.update(indices.astype("<i8").tobytes())
    _add_images(found, image)
    return found.hexdigest()


def image_digest(image: Tensor | Sequence[Any]) -> str:
    """A sha256 of all images, independent of their labels and of which are in use.

    It covers every value of a tensor. Of files it covers names, folder names and sizes, and the content of at most
    ``FILES`` of them, evenly spaced.

    Args:
        image: ``[N, ...]``, or paths of files.

    Returns:
        the digest in hexadecimal.
    """
    found = hashlib.sha256()
    if isinstance(image, Tensor):
        for rows in image.split(ROWS):
            found.update(np.ascontiguousarray(rows.numpy()).reshape(-1).view(np.uint8).data)
        return found.hexdigest()
    _add_images(found, image)
    step = -(-len(image) // FILES) or 1
    for k, path in enumerate(image):
        with suppress(OSError):  # reading the image raises for a missing file
            found.update(f"{Path(path).stat().st_size}\n".encode())
            found.update(b"" if k % step else hashlib.sha256(Path(path).read_bytes()).digest())
    return found.hexdigest()


def _add_images(found: Any, image: Tensor | Sequence[Any]) -> None:
    if isinstance(image, Tensor):
        rows = image.flatten(1)
        rows = rows[:: len(rows) // IMAGES + 1, :: rows.shape[1] // PIXELS + 1]
        found.update(np.ascontiguousarray(rows.numpy()).tobytes())
    else:
        names = ("/".join(Path(str(path)).parts[-2:]) for path in image)
        found.update("\n".join(names).encode("utf-8", "surrogateescape"))
