"""Converts a single sample of any form to the input of a run's network, as the run's evaluation does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import v2

from lightning_kd.data.image_files import as_rgb, read_image, truncated_allowed, upright, without_range

__all__ = ["Preparation", "of_older_checkpoint"]

# float images may exceed 0 to 1 by this much: spline interpolation overshoots
BEYOND = 0.1


class Preparation:
    """Converts a path, a PIL image, an array or a tensor to the input of a network.

    Args:
        description: of the data, see ``LabelledDataModule.describe``. With ``resize`` images are resized by their short
            side and centre-cropped; with ``stretch`` they are resized without keeping the aspect ratio; else the
            largest central part of the right ratio is cropped and resized.
        input_shape: ``(C, H, W)``, or ``(D,)`` for features.
    """

    def __init__(self, description: Mapping[str, Any], input_shape: tuple[int, ...]) -> None:
        self.input_shape = tuple(input_shape)
        channels = self.input_shape[0]
        self.mean = list(description.get("mean") or [0.0] * channels)
        self.std = list(description.get("std") or [1.0] * channels)
        self.resize: int | None = description.get("resize")
        self.stretch = bool(description.get("stretch"))
        self.background = tuple(description.get("background") or (255, 255, 255))
        self.image_range = description.get("image_range")
        self.truncated = bool(description.get("truncated"))

    @property
    def by_file(self) -> bool:
        """Whether the run was trained on image files, which are resized to the network's input."""
        return self.resize is not None or self.stretch

    def __call__(self, sample: Any) -> Tensor:
        """One sample, normalised, float32 of ``input_shape``."""
        sample = self.unit(sample)
        shape = (-1, *[1] * (sample.ndim - 1))
        mean, std = (torch.tensor(values, dtype=torch.float32).view(shape) for values in (self.mean, self.std))
        return (sample - mean) / std

    def unit(self, sample: Any) -> Tensor:
        """One sample as float32 on the CPU before normalisation; images have values from 0 to 1.

        Raises:
            TypeError, ValueError: where the sample does not suit the run; the message says what to do.
        """
        if isinstance(sample, np.ndarray) and (len(self.input_shape) == 1 or self.input_shape[0] not in (1, 3)):
            if sample.ndim not in (1, 3):
                raise ValueError(
                    f"an array must be one sample of shape {self.input_shape}, features [D] or an image [H, W, C], got "
                    f"{sample.shape}: reshape it"
                )
            sample = torch.from_numpy(np.ascontiguousarray(sample if sample.ndim == 1 else sample.transpose(2, 0, 1)))
        if not isinstance(sample, Tensor):
            sample = v2.functional.pil_to_tensor(self.sized(self.picture(sample)))
        if tuple(sample.shape) != self.input_shape:
            raise ValueError(
                f"a tensor must have the shape of the training samples, {self.input_shape}, got {tuple(sample.shape)}: "
                "resize it, or give a PIL image or a uint8 array [H, W, C]"
            )
        if sample.dtype == torch.uint8:
            sample = sample.float() / 255
        elif not sample.is_floating_point():
            raise ValueError(f"a tensor must be uint8, or float from 0 to 1, got {sample.dtype}: convert it")
        sample = sample.cpu().float()
        if len(self.input_shape) == 3:
            _check_unit(sample)
        elif not sample.isfinite().all():
            raise ValueError("features must be finite, got NaN or infinite values: remove or replace them")
        return sample

    def picture(self, sample: Any) -> Image.Image:
        """A path, an image or an array as a PIL image with the number of channels of the network's input."""
        if len(self.input_shape) == 1:
            raise ValueError(
                f"this run takes rows of {self.input_shape[0]} features, got {type(sample).__name__}: give float arrays"
            )
        if isinstance(sample, str | Path):
            with truncated_allowed(self.truncated):
                picture = read_image(sample, self.background, self.image_range)
        elif isinstance(sample, Image.Image):
            picture = as_rgb(upright(sample), "given", self.background, self.image_range, without_range(sample))
        elif isinstance(sample, np.ndarray):
            picture = _picture_of(sample, self.background)
        else:
            raise TypeError(
                f"an image must be a path, a PIL image, an array or a tensor, got {type(sample).__name__}: convert it"
            )
        if self.input_shape[0] not in (1, 3):
            raise ValueError(f"this run takes images of {self.input_shape[0]} channels: give tensors or uint8 arrays")
        return picture.convert("L") if self.input_shape[0] == 1 else picture

    def sized(self, picture: Image.Image) -> Image.Image:
        """The image resized or cropped to the size of the network's input."""
        height, width = self.input_shape[1:]
        if self.stretch:
            return v2.Resize((height, width))(picture)  # type: ignore[no-any-return]
        if self.resize is not None:
            return v2.CenterCrop((height, width))(v2.Resize(self.resize)(picture))  # type: ignore[no-any-return]
        if picture.size == (width, height):
            return picture
        return ImageOps.fit(picture, (width, height), Image.Resampling.BILINEAR)


def of_older_checkpoint(description: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Completes the description in an older checkpoint, which does not tell whether image files were stretched.

    They were for data with several labels or with masks that has an ``image_size``.

    Args:
        description: the description in the checkpoint.
        arguments: arguments of the data module, by name.
    """
    of_files = description.get("problem") in ("MultiLabel", "Segmentation") and "image_size" in arguments
    return {**({"stretch": True} if of_files else {}), **description}


def _picture_of(array: np.ndarray, background: tuple[int, ...]) -> Image.Image:
    channels = array.shape[2] if array.ndim == 3 else 1
    fits = array.ndim in (2, 3) and channels in (1, 3, 4) and array.size
    if not fits or (array.dtype != np.uint8 and not np.issubdtype(array.dtype, np.floating)):
        raise ValueError(
            f"an array must be an image [H, W] or [H, W, C] of 1, 3 or 4 channels, uint8 or float from 0 to 1, got "
            f"{array.dtype} {array.shape}: convert it"
        )
    if array.dtype != np.uint8:
        _check_unit(torch.from_numpy(np.ascontiguousarray(array)))
        array = np.round(array.clip(0, 1) * 255).astype(np.uint8)
    array = np.ascontiguousarray(array[..., 0] if channels == 1 and array.ndim == 3 else array)
    return as_rgb(Image.fromarray(array), background=background)


def _check_unit(image: Tensor) -> None:
    least, most = (float(value) for value in image.aminmax())
    if not (least >= -BEYOND and most <= 1 + BEYOND):  # true for NaN, too
        raise ValueError(
            f"a float image must be from 0 to 1 and not normalised, got values from {least:.4g} to {most:.4g}: divide "
            "by 255, undo the normalisation, or give uint8"
        )
