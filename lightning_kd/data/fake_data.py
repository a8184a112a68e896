"""Small synthetic data sets that a network can learn, for tests and for trying things out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from lightning_kd.core.seeding import numpy_generator
from lightning_kd.data.array_files import Arrays

__all__ = ["fake_arrays", "fake_label_arrays", "fake_mask_arrays", "fake_unlabelled"]


def fake_arrays(shape: tuple[int, ...], num_classes: int) -> Arrays:
    """A small synthetic data set that a network can learn: a fixed random pattern for each class, plus noise.

    Patterns are coarse, so that classes still differ after crops and flips.

    Args:
        shape: ``(C, H, W)`` for uint8 images, ``(D,)`` for float32 features.
        num_classes: number of classes.

    Returns:
        At least 256 training samples and half as many test samples, at least 4 and 2 of each class; the same in every
        call.
    """
    samples = _fake_samples(shape, num_classes)
    count = max(256, 4 * num_classes)
    return Arrays(*samples(count), *samples(count // 2))


def fake_unlabelled(shape: tuple[int, ...], num_classes: int) -> Tensor:
    """Further samples of the classes of ``fake_arrays``, as many as its training set and different from it."""
    samples = _fake_samples(shape, num_classes)
    count = max(256, 4 * num_classes)
    return [samples(size)[0] for size in (count, count // 2, count)][-1]  # skips those of fake_arrays


def _fake_samples(shape: tuple[int, ...], num_classes: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    """A function that generates the given number of samples and their classes, new ones in each call."""
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

    return samples


def fake_label_arrays(shape: tuple[int, ...], num_classes: int) -> Arrays:
    """A synthetic multi-label data set: an image is the sum of the fixed coarse patterns of its labels.

    Args:
        shape: ``(C, H, W)`` for uint8 images, ``(D,)`` for float32 features.
        num_classes: ``C``; each label is positive with probability 0.3, and every sample has at least one.

    Returns:
        256 training and 128 test samples with targets float32 ``[N, C]``; the same in every call.
    """
    generator = numpy_generator(0, "fake_labels")
    pattern = generator.integers(-64, 65, (num_classes, shape[0], *[4] * (len(shape) - 1))).astype(np.float64)
    for axis, length in enumerate(shape[1:], 2):
        pattern = pattern.take(np.arange(length) * 4 // length, axis)

    def samples(count: int) -> tuple[Tensor, Tensor]:
        label = generator.random((count, num_classes)) < 0.3
        label[np.arange(count), generator.integers(0, num_classes, count)] = True
        noise = generator.integers(-16, 17, (count, *shape))
        image = np.tensordot(label.astype(np.float64), pattern, 1) + noise
        target = torch.from_numpy(label.astype(np.float32))
        if len(shape) == 1:
            return torch.from_numpy((image / 64).astype(np.float32)), target
        return torch.from_numpy((128 + image).clip(0, 255).astype(np.uint8)), target

    return Arrays(*samples(256), *samples(128))


def fake_mask_arrays(shape: tuple[int, int, int], num_classes: int) -> Arrays:
    """A synthetic segmentation data set: boxes in the colour of their class on a background of class 0.

    Args:
        shape: ``(C, H, W)``.
        num_classes: number of classes.

    Returns:
        128 training and 64 test samples, fewer where images are large, with targets int16 ``[N, H, W]`` whose top row
        is ignored (-1); the same in every call.
    """
    generator = numpy_generator(0, "fake_masks")
    colour = generator.integers(0, 256, (num_classes, shape[0])).astype(np.int64)
    _, height, width = shape

    def samples(count: int) -> tuple[Tensor, Tensor]:
        mask = np.zeros((count, height, width), dtype=np.int16)
        for one in mask:
            for _ in range(3):
                tall = generator.integers(height // 4, height // 2 + 1)
                wide = generator.integers(width // 4, width // 2 + 1)
                top, left = generator.integers(0, height - tall + 1), generator.integers(0, width - wide + 1)
                one[top : top + tall, left : left + wide] = generator.integers(0, num_classes)
        image = colour[mask].transpose(0, 3, 1, 2) + generator.integers(-24, 25, (count, *shape))
        mask[:, 0] = -1
        return torch.from_numpy(image.clip(0, 255).astype(np.uint8)), torch.from_numpy(mask)

    count = min(128, max(8, 2**22 // (height * width)))
    return Arrays(*samples(count), *samples(count // 2))
