"""Random crops of image files that are drawn once, stored as boxes, and cut out again later."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from lightning_kd.core.view_keys import ViewKeys
from lightning_kd.data.streaming import ImageFiles, KeyedFiles, sample_generator

__all__ = ["CropFiles", "CropRecipe", "PlainFiles"]


@dataclass(frozen=True)
class CropRecipe:
    """Draws and cuts random crops of an image, as ``RandomResizedCrop`` and ``RandomHorizontalFlip`` do.

    Args:
        size: height and width that crops are resized to (bilinear, antialiased).
        scale: smallest and largest fraction of the image's area that a crop covers.
        ratio: smallest and largest aspect ratio, width / height.
        mean: mean of each channel, to normalise crops.
        std: standard deviation of each channel.
    """

    size: int
    scale: tuple[float, float]
    ratio: tuple[float, float]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def draw(self, image: Image.Image, index: int, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Draw ``count`` crops of an image; they depend only on its size, its ``index`` and the ``seed``.

        Returns boxes float32 ``[count, 4]`` (top, left, height, width, as fractions of the image) and flips bool
        ``[count]``, see ``StoredCrops``.
        """
        crop = v2.RandomResizedCrop(self.size, scale=self.scale, ratio=self.ratio)
        boxes, flips = np.zeros((count, 4), np.float32), np.zeros(count, bool)
        for key in range(count):
            with sample_generator(seed, key, 0, index):
                found = crop.make_params([image])
                flips[key] = bool(torch.rand(1) < 0.5)
            boxes[key] = [
                found["top"] / image.height,
                found["left"] / image.width,
                found["height"] / image.height,
                found["width"] / image.width,
            ]
        return boxes, flips

    def cut(self, image: Image.Image, box: np.ndarray, flip: bool) -> Tensor:
        """Cut one crop out of an upright image, resized and normalised, float32 ``[3, S, S]``.

        Boxes are fractions in float32, exact to a hundredth of a pixel in images of 100,000 pixels a side, so rounding
        gives back the pixels that were drawn.
        """
        top, left, height, width = (
            round(float(share) * length) for share, length in zip(box, (image.height, image.width) * 2, strict=True)
        )
        cropped = tv.resized_crop(image, top, left, height, width, [self.size, self.size])
        if flip:
            cropped = tv.horizontal_flip(cropped)
        pixels = tv.to_dtype(tv.pil_to_tensor(cropped), torch.float32, scale=True)
        return tv.normalize(pixels, list(self.mean), list(self.std))


class CropFiles(KeyedFiles):
    """Image files of which each visit returns some of a fixed number of crops; one visit reads the file once.

    ``[epoch, pass, index]`` gives ``(images [n, 3, S, S], target, index, keys [n])``; a key is the number of a crop.

    Args:
        files: the image files.
        recipe: draws and cuts the crops.
        keys: the number of crops of each image, and which of them each visit returns.

    Raises:
        ValueError: if ``keys`` has no fixed number of crops.
    """

    def __init__(self, files: ImageFiles, recipe: CropRecipe, keys: ViewKeys) -> None:
        if keys.fixed is None:
            raise ValueError(
                "there are infinitely many random crops of image files: give a number, as --views 200, or teach "
                "--views plain and train with data.augment false"
            )
        super().__init__(files, keys, keys.fixed)
        self.recipe = recipe

    def crops(self, index: int, image: Image.Image | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Boxes and flips of all crops of an image: the stored ones, else drawn by the recipe."""
        if self.keys.crops is not None:
            return self.keys.crops.crops_of(index)
        return self.recipe.draw(self.read(index) if image is None else image, index, self.count, self.keys.seed)

    def cut(self, index: int, keys: np.ndarray) -> Tensor:
        """The crops ``keys`` of an image, float32 ``[n, 3, S, S]``."""
        image = self.read(index)
        boxes, flips = self.crops(index, image)
        return torch.stack([self.recipe.cut(image, boxes[key], bool(flips[key])) for key in keys.tolist()])

    def describe(self) -> dict[str, Any]:
        """Everything that the crops depend on, as plain values."""
        recipe = self.recipe
        found: dict[str, Any] = {"size": recipe.size, "scale": list(recipe.scale), "ratio": list(recipe.ratio)}
        found |= {"background": list(self.background), "image_range": self.image_range and list(self.image_range)}
        return found | {"fixed": self.count, "seed": self.keys.seed, "crops": True}


class PlainFiles(KeyedFiles):
    """Image files without augmentation: each image has one view, the one of an evaluation.

    ``[epoch, pass, index]`` gives ``(images [1, 3, S, S], target, index, keys [1])``; the key is 0.

    Args:
        files: the image files, with the transform of an evaluation.
        resize: length of the short side after the transform's resize, for ``describe``.
        size: height and width of the centre crop, for ``describe``.
        keys: the number of views of each image: ``None`` or 1.

    Raises:
        ValueError: if ``keys`` has more than one view of an image.
    """

    def __init__(self, files: ImageFiles, resize: int, size: int, keys: ViewKeys) -> None:
        if keys.fixed not in (None, 1):
            raise ValueError(
                f"without augmentation an image has 1 view, got {keys.fixed}: teach --views plain, or set "
                "data.augment to true"
            )
        super().__init__(files, keys, 1)
        self.resize, self.size = resize, size

    def crops(self, index: int) -> None:
        return None

    def cut(self, index: int, keys: np.ndarray) -> Tensor:
        return self.transform(self.read(index))[None].repeat(len(keys), 1, 1, 1)  # type: ignore[operator]

    def describe(self) -> dict[str, Any]:
        """All settings that the images depend on, in plain values."""
        found: dict[str, Any] = {"size": self.size, "resize": self.resize}
        found |= {"background": list(self.background), "image_range": self.image_range and list(self.image_range)}
        return found | {"fixed": self.keys.fixed, "seed": self.keys.seed, "crops": False}
