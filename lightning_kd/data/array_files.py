"""Reads, checks and writes the arrays of data sets: images, features, targets and masks."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_kd.core.notes import note
from lightning_kd.file_writing import written_whole


class Arrays(NamedTuple):
    """A data set in memory.

    Images are uint8 ``[N, C, H, W]``, features float32 ``[N, D]``; targets are int64 ``[N]``, or float32 ``[N, C]`` for
    several labels, or masks int16 ``[N, H, W]``.

    ``val_*`` is ``None`` where the validation set is split off the training set.
    """

    train_image: Any
    train_target: Tensor
    test_image: Any
    test_target: Tensor
    val_image: Any = None
    val_target: Tensor | None = None


def read_arrays(path: Path, argument: str = "path") -> dict[str, np.ndarray]:
    """The arrays of an ``.npz`` by name, or the array of a ``.npy`` under the name ``""``. Pickles are never loaded.

    Raises:
        FileNotFoundError, PermissionError: where the file, ``argument`` in messages, does not exist or may not be read.
        ValueError: where the file is damaged, holds pickled objects, or is neither an ``.npz`` nor a ``.npy``.
    """
    named = f"{argument} {str(path)!r}".strip()
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {"": loaded}
        with loaded:
            return {name: loaded[name] for name in loaded.files}
    except FileNotFoundError:
        raise FileNotFoundError(f"{named} does not exist: give the path of an .npz or .npy file") from None
    except PermissionError:
        raise PermissionError(f"{named} may not be read: check the permissions of the file") from None
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        if "Object arrays" in str(error):
            raise ValueError(
                f"{named} holds Python objects, which are never unpickled: save arrays of numbers, or of text by "
                "array.astype(str)"
            ) from None
        reason = str(error).partition(". If you trust")[0]  # numpy's advice to load it all the same
        raise ValueError(
            f"{named} is damaged, or not an .npz/.npy file of plain arrays ({reason}): replace it, or delete it "
            "if it can be written again"
        ) from error


def write_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write an ``.npz`` whole or not at all: a temporary file beside ``path`` is written and then renamed."""
    with written_whole(path, durable=True) as part, open(part, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def check_keys(arrays: dict[str, np.ndarray], keys: Sequence[str], where: str) -> None:
    """Raise a ``ValueError`` where ``arrays`` lacks one of ``keys``."""
    if missing := [key for key in keys if key not in arrays]:
        raise ValueError(
            f"{where} lacks {', '.join(missing)}, it holds {', '.join(arrays) or 'nothing'}: replace or delete the file"
        )


def to_image(array: np.ndarray, name: str, shape: tuple[int, int, int] | None = None) -> Tensor:
    """Convert images ``[N, H, W, C]`` or ``[N, H, W]`` to uint8 ``[N, C, H, W]``, after checks.

    Raises:
        ValueError: where they are not uint8, not of that rank, not channels-last, or not of ``shape`` (H, W, C).
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
    """Convert features ``[N, D]`` to float32, after checks.

    Raises:
        ValueError: where they are not floats of rank 2, or not finite.
    """
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.floating):
        raise ValueError(
            f"{name} must hold uint8 images or float features [N, D], got {array.dtype} {array.shape}: convert it"
        )
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite, got NaN or infinite values: remove or replace those samples")
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))


def to_target(array: np.ndarray, count: int, num_classes: int | None, name: str) -> Tensor:
    """Convert class labels to int64 ``[N]``, after checks.

    Args:
        array: integers ``[N]``.
        count: number of samples that the labels are for.
        num_classes: labels must be below it; with ``None`` they need only be 0 or more.
        name: name of the array in error messages.

    Raises:
        ValueError: where the array is empty, its rank, dtype or length is wrong, or a label is out of range.
    """
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        remedy = "save names by array.astype(str)" if array.dtype.kind == "S" else "convert it by array.astype(int)"
        remedy = "give one class a sample" if array.ndim != 1 else remedy
        raise ValueError(f"{name} must hold integers [N], got {array.dtype} {array.shape}: {remedy}")
    _check_count(array, count, name)
    wrong = array < 0 if num_classes is None else (array < 0) | (array >= num_classes)
    if wrong.any():
        at = int(wrong.argmax())
        limit = "0 or more" if num_classes is None else f"between 0 and {num_classes - 1}"
        raise ValueError(f"{name} must be {limit}, got {array[at]} at position {at}: correct the labels")
    return torch.from_numpy(array.astype(np.int64))


def number_classes(
    targets: Sequence[np.ndarray], class_names: list[str] | None, where: str
) -> tuple[list[str] | None, list[np.ndarray]]:
    """Convert targets with one class per sample to class indices from 0 on, and find the class names.

    Strings are class names, numbered in the order of ``class_names`` or alphabetically. Without ``class_names``,
    integers are renumbered in ascending order, with the old numbers as class names, if they start above 0 or if fewer
    than half of the numbers in their range occur. If ``class_names`` are whole numbers, integers are looked up among
    them. If they are ``C`` other names, integers that are exactly 1 to ``C`` become 0 to ``C - 1``. A printed note says
    what was done.

    Args:
        targets: arrays ``[N]`` (or ``[N, 1]``) of one data set.
        class_names: the names that the user gave.
        where: where the targets come from, for messages.

    Raises:
        ValueError: for a label that is not in ``class_names``, and for integers that could be class indices or class
            names.
    """
    if not targets:  # the caller raises for missing arrays
        return class_names, []
    targets = [target.astype(np.uint8) if target.dtype == bool else target for target in targets]
    kinds = {target.dtype.kind for target in targets}
    if kinds == {"U"}:
        values = class_names or np.unique(np.concatenate([target.reshape(-1) for target in targets])).tolist()
        number = {name: k for k, name in enumerate(values)}
        for target in targets:
            if unknown := [name for name in np.unique(target).tolist() if name not in number]:
                raise ValueError(f"{where} holds the label {unknown[0]!r}, which is not in class_names: correct one")
        lookup = np.vectorize(number.__getitem__, otypes=[np.int64])
        return list(values), [lookup(target) if target.size else target.astype(np.int64) for target in targets]
    if not kinds <= {"i", "u"} or not all(target.size for target in targets):
        return class_names, list(targets)
    labels = np.unique(np.concatenate([target.reshape(-1).astype(np.int64) for target in targets]))
    if class_names:
        return class_names, _numbers_among(labels, targets, class_names, where)
    if labels[0] < 0 or (labels[0] == 0 and labels[-1] + 1 <= 2 * len(labels)):
        return None, list(targets)
    names = [str(label) for label in labels.tolist()]
    if len(names) > 1:  # the caller refuses a single class
        what = f"the {len(names)} labels that occur ({_first_names(names)})"
        note(f"{where}: {what} are renumbered from 0, and the old numbers become the class names")
    return names, [np.searchsorted(labels, target) for target in targets]


def _numbers_among(
    labels: np.ndarray, targets: Sequence[np.ndarray], class_names: list[str], where: str
) -> list[np.ndarray]:
    """Convert integer targets to indices into ``class_names``; ``labels`` are the distinct values that occur."""
    count = len(class_names)
    numbered = labels[0] >= 0 and labels[-1] < count
    if not only_numbers(class_names):
        if labels.tolist() != [*range(1, count + 1)]:
            return list(targets)
        note(f"{where}: the labels 1 to {count} are the classes {_first_names(class_names)}, numbered from 0")
        return [target - 1 for target in targets]
    names = [int(name) for name in class_names]
    if names == [*range(count)]:
        return list(targets)
    unknown = sorted({*labels.tolist()} - {*names})
    if unknown and not numbered:
        raise ValueError(f"{where} holds the label {unknown[0]}, which is not in class_names: correct one")
    if unknown:
        note(f"{where}: the labels are read as class indices, 0 for {class_names[0]!r} and so on")
        return list(targets)
    if numbered and names != sorted(names):  # class folders are sorted as text: 1, 10, 2
        raise ValueError(
            f"the labels of {where} may be class indices or class names, which are {_first_names(class_names)}: save "
            "the names as text"
        )
    note(f"{where}: the labels are read as class names, which are {_first_names(class_names)}")
    order = np.argsort(names)
    return [order[np.searchsorted(names, target, sorter=order)] for target in targets]


def only_numbers(names: Sequence[str]) -> bool:
    """Whether all names are whole numbers."""
    return all(name.isdecimal() for name in names)


def _first_names(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + ", ..." * (len(names) > 5)


def to_label_matrix(array: np.ndarray, count: int, num_classes: int | None, name: str) -> Tensor:
    """Convert multi-label targets, uint8 ``[N, C]`` of 0, 1 and 255 (unknown), to float32 of 0, 1 and -1.

    Raises:
        ValueError: for another dtype, shape or value; arguments as in ``to_target``.
    """
    if array.ndim != 2 or array.dtype != np.uint8 or not array.shape[1] or num_classes not in (None, array.shape[1]):
        wanted = "C" if num_classes is None else num_classes
        raise ValueError(f"{name} must hold uint8 labels [N, {wanted}], got {array.dtype} {array.shape}: convert them")
    _check_count(array, count, name)
    wrong = (array > 1) & (array < 255)
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise ValueError(
            f"{name} must hold 0, 1 and 255 (unknown), got {array[row, column]} at {row}, {column}: correct them"
        )
    return torch.from_numpy(np.where(array == 255, np.float32(-1), array.astype(np.float32)))


def array_named(path: Path, key: str | None, usual: str) -> np.ndarray:
    """The array ``key`` of a file. Without ``key``: the one named ``usual``, else ``given``, else the only one.

    Raises:
        ValueError: where there is none, and as in ``read_arrays``.
    """
    arrays = read_arrays(path)
    for name in [key] if key is not None else [usual, "given", *(arrays if len(arrays) == 1 else ())]:
        if name in arrays:
            return arrays[name]
    raise ValueError(f"key={key!r} is not in {str(path)!r}, which holds {', '.join(arrays)}: give one of them")


def to_masks(array: np.ndarray, count: int, num_classes: int | None, name: str, shape: tuple[int, ...]) -> Tensor:
    """Convert masks, uint8 ``[N, H, W]`` of class indices and 255 (ignored), to int16 with -1 for ignored pixels.

    Args:
        array: the masks.
        count: number of samples that the masks are for.
        num_classes: class indices must be below it; ``None`` for no limit.
        name: name of the array in error messages.
        shape: ``(C, H, W)`` of the images.

    Raises:
        ValueError: for another dtype, shape or value.
    """
    if array.ndim != 3 or array.dtype != np.uint8 or array.shape[1:] != tuple(shape[1:]):
        raise ValueError(
            f"{name} must hold uint8 masks [N, {', '.join(map(str, shape[1:]))}], as large as the images, got "
            f"{array.dtype} {array.shape}: convert them"
        )
    _check_count(array, count, name)
    largest = int(np.where(array == 255, 0, array).max())
    if num_classes is not None and largest >= num_classes:
        raise ValueError(
            f"{name} must be between 0 and {num_classes - 1}, or 255 to be ignored, got {largest}: correct the masks"
        )
    masks = torch.from_numpy(array.astype(np.int16))
    return masks.masked_fill_(masks == 255, -1)


def _check_count(array: np.ndarray, count: int, name: str) -> None:
    if len(array) != count:
        raise ValueError(f"{name} has {len(array)} labels, got {count} samples: give one label for each sample")
    if count == 0:
        raise ValueError(f"{name} is empty, got 0 samples: give at least one")


def image_statistics(image: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel of uint8 images ``[N, C, H, W]``, for values scaled to 0..1."""
    value = np.arange(256) / 255
    mean, std = [], []
    for channel in range(image.shape[1]):
        count = sum(np.bincount(part[:, channel].reshape(-1).numpy(), minlength=256) for part in image.split(1024))
        frequency = count / np.sum(count)
        mean.append(float(frequency @ value))
        std.append(float(np.sqrt(frequency @ (value - mean[-1]) ** 2)) or 1.0)  # a constant channel is not scaled
    return mean, std
