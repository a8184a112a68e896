"""What a checkpoint remembers of the data that it was trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

__all__ = ["data_digest", "image_digest"]

# pixels of each image, and images, that are looked at: reading all of a large file would take minutes
PIXELS, IMAGES = 16, 200_000
# images that are in memory together, and files whose content is read
ROWS, FILES = 1024, 1000


def data_digest(image: Tensor | Sequence[Any], target: Tensor, indices: np.ndarray) -> str:
    """The sha256 of what a memory of each sample hangs on: which samples there are, in which order, with which labels.

    Images are told apart by a few of their pixels, files by their names and those of their folders.

    Args:
        image: the training images ``[N, ...]``, or their files.
        target: ``[N, ...]``.
        indices: int64 ``[n]``, the samples in use.
    """
    found = hashlib.sha256(np.ascontiguousarray(target.numpy()).tobytes())
    found.update(indices.astype("<i8").tobytes())
    _add_images(found, image)
    return found.hexdigest()


def image_digest(image: Tensor | Sequence[Any]) -> str:
    """The sha256 of all images alone, whatever their labels, and whichever are in use.

    Of a tensor every number counts; of files their names, those of their folders and their sizes, and what is in
    ``FILES`` of them, spread evenly, so in all of fewer.

    Args:
        image: ``[N, ...]``, or files.
    """
    found = hashlib.sha256()
    if isinstance(image, Tensor):
        for rows in image.split(ROWS):
            found.update(np.ascontiguousarray(rows.numpy()).reshape(-1).view(np.uint8).data)
        return found.hexdigest()
    _add_images(found, image)
    step = -(-len(image) // FILES) or 1
    for k, path in enumerate(image):
        with suppress(OSError):  # a missing file is told by whoever reads it
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
