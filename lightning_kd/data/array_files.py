"""Reading, checking, writing and making up the arrays of a data set."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor

from lightning_kd.core.seeding import numpy_generator


class Arrays(NamedTuple):
    """A data set in memory. Images are uint8 ``[N, C, H, W]``, features float32 ``[N, D]``, targets int64 ``[N]``.

    ``val_*`` is ``None`` where the validation set is taken out of the training set.
    """

    train_image: Any
    train_target: Tensor
    test_image: Any
    test_target: Tensor
    val_image: Any = None
    val_target: Tensor | None = None


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a ``.npz``, or the one of a ``.npy`` under the key ``""``. Pickles are never read.

    Raises:
        FileNotFoundError, PermissionError: if there is no such file, or it may not be read.
        ValueError: if the file is damaged, holds pickled objects, or is none of the two.
    """
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {"": loaded}
        with loaded:
            return {name: loaded[name] for name in loaded.files}
    except FileNotFoundError:
        raise FileNotFoundError(f"{str(path)!r} does not exist: give the path of an .npz or .npy file") from None
    except PermissionError:
        raise PermissionError(f"{str(path)!r} may not be read: check the permissions of the file") from None
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"{str(path)!r} is damaged, or no .npz/.npy file of plain arrays ({error}): replace it, or delete it if it "
            "can be made again"
        ) from error


def write_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write an ``.npz`` whole or not at all: into a temporary file beside ``path``, which then takes its place."""
    part = path.with_name(f".{path.name}.{uuid4().hex}.part")
    try:
        with open(part, "xb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def check_keys(arrays: dict[str, np.ndarray], keys: Sequence[str], where: str) -> None:
    """Raise a ``ValueError`` where ``arrays`` lacks one of ``keys``."""
    if missing := [key for key in keys if key not in arrays]:
        raise ValueError(
            f"{where} lacks {', '.join(missing)}, it holds {', '.join(arrays) or 'nothing'}: replace or delete the file"
        )


def to_image(array: np.ndarray, name: str, shape: tuple[int, int, int] | None = None) -> Tensor:
    """Images ``[N, H, W, C]`` or ``[N, H, W]`` to uint8 ``[N, C, H, W]``, after checking them.

    Raises:
        ValueError: if they are not uint8, not of that rank, not channels-last, or not of ``shape`` (H, W, C).
    """
    got = f"{array.dtype} {array.shape}"
    if array.dtype != np.uint8 or array.ndim not in (3, 4):
        raise ValueError(f"{name} must hold uint8 images [N, H, W, C] or [N, H, W], got {got}: convert them to 0..255")
    if array.ndim == 3:
        array = array[..., None]
    if shape is not None and array.shape[1:] != shape:
        raise ValueError(f"{name} must hold images of (H, W, C) = {shape}, got {got}: is this the right file?")
    if shape is None and array.shape[1] <= 4 < array.shape[3]:
        raise ValueError(f"{name} must have the channels last, got {got}: transpose it to [N, H, W, C]")
    return torch.from_numpy(np.ascontiguousarray(array.transpose(0, 3, 1, 2)))


def to_feature(array: np.ndarray, name: str) -> Tensor:
    """Features ``[N, D]`` to float32, after checking them.

    Raises:
        ValueError: if they are not floats of rank 2, or not finite.
    """
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.floating):
        raise ValueError(
            f"{name} must hold uint8 images or float features [N, D], got {array.dtype} {array.shape}: convert it"
        )
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite, got NaN or infinite values: remove or replace those samples")
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))


def to_target(array: np.ndarray, count: int, num_classes: int | None, name: str) -> Tensor:
    """Class labels to int64 ``[N]``, after checking them.

    Args:
        array: integers ``[N]``.
        count: how many samples they belong to.
        num_classes: the upper limit; ``None`` checks only that none is negative.
        name: what to call them in errors.

    Raises:
        ValueError: if there are none, if rank, dtype or number do not fit, or a label is out of range.
    """
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} must hold integers [N], got {array.dtype} {array.shape}: give one class a sample")
    if len(array) != count:
        raise ValueError(f"{name} has {len(array)} labels, got {count} samples: give one label for each sample")
    if count == 0:
        raise ValueError(f"{name} is empty, got 0 samples: give at least one")
    wrong = array < 0 if num_classes is None else (array < 0) | (array >= num_classes)
    if wrong.any():
        at = int(wrong.argmax())
        limit = "0 or more" if num_classes is None else f"between 0 and {num_classes - 1}"
        raise ValueError(f"{name} must be {limit}, got {array[at]} at position {at}: correct the labels")
    return torch.from_numpy(array.astype(np.int64))


def image_statistics(image: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel of uint8 ``[N, C, H, W]``, in units of 255."""
    value = np.arange(256) / 255
    mean, std = [], []
    for channel in range(image.shape[1]):
        count = sum(np.bincount(part[:, channel].reshape(-1).numpy(), minlength=256) for part in image.split(1024))
        share = count / np.sum(count)
        mean.append(float(share @ value))
        std.append(float(np.sqrt(share @ (value - mean[-1]) ** 2)) or 1.0)  # a constant channel stays as it is
    return mean, std


def fake_arrays(shape: tuple[int, ...], num_classes: int) -> Arrays:
    """A small made-up data set that can be learned: a fixed random pattern for each class, plus noise.

    The patterns are coarse, so that crops and flips of them still differ between classes.

    Args:
        shape: ``(C, H, W)`` for uint8 images, ``(D,)`` for float32 features.
        num_classes: the number of classes.

    Returns:
        at least 256 training samples and half as many test samples, 4 and 2 or more a class; always the same ones.
    """
    generator = numpy_generator(0, "fake")
    pattern: np.ndarray
    if len(shape) == 1:
        pattern = generator.normal(0, 1, (num_classes, *shape))
    else:
        pattern = generator.integers(0, 256, (num_classes, shape[0], 4, 4), dtype=np.uint8)
        for axis, length in ((2, shape[1]), (3, shape[2])):
            pattern = pattern.take(np.arange(length) * 4 // length, axis)

    def samples(count: int) -> tuple[Tensor, Tensor]:
        target = generator.permutation(np.arange(count) % num_classes)
        if len(shape) == 1:
            image = (pattern[target] + generator.normal(0, 0.5, (count, *shape))).astype(np.float32)
        else:
            noise = generator.integers(-48, 49, (count, *shape), dtype=np.int8)
            image = np.clip(pattern[target] + noise.astype(np.int16), 0, 255).astype(np.uint8)
        return torch.from_numpy(image), torch.from_numpy(target)

    count = max(256, 4 * num_classes)
    return Arrays(*samples(count), *samples(count // 2))
