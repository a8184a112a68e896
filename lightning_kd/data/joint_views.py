"""Random scaling, cropping, flipping and colour changes of an image together with its mask."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as tv

from lightning_kd.argument_checks import check_numbers
from lightning_kd.data.augment import Normalize
from lightning_kd.data.image_files import read_image
from lightning_kd.data.mask_files import MaskTable
from lightning_kd.data.streaming import Key, sample_generator

__all__ = ["JointViews", "MaskedImages", "PairFiles", "PairTensors"]


class JointViews:
    """Draws a random view of an image and its mask from torch's global generator.

    The image is scaled (bilinear; its mask by nearest neighbour), cropped at a random place, flipped left-right with
    probability 1/2, and changed in brightness, contrast and saturation. Where the crop is larger than the image, it is
    padded at the bottom and right with 0 after normalisation (the mean colour), and with -1 in the mask.

    Args:
        size: height and width of the crop.
        scale: smallest and largest scaling factor.
        scale_step: distance between the possible factors, which are equally likely; ``None`` for a uniform factor.
        flip: whether to flip.
        colour: brightness, contrast and saturation are each multiplied by 1 plus a uniform number in [-colour, colour];
            0 is off.

    Raises:
        ValueError: for a number out of its range.
    """

    def __init__(
        self,
        size: Sequence[int],
        scale: Sequence[float] = (0.5, 2.0),
        scale_step: float | None = 0.1,
        flip: bool = True,
        colour: float = 0.0,
    ) -> None:
        check_sides(crop_size=size)
        for factor in scale:
            check_numbers(above=0, scale=factor)
        if len(scale) != 2 or scale[0] > scale[1]:
            raise ValueError(f"scale must be two numbers, the smaller one first, got {list(scale)}: swap them")
        check_numbers(above=0, optional=True, scale_step=scale_step)
        check_numbers(least=0, below=1, colour=colour)
        self.size = size[0], size[1]
        self.low, self.high = float(scale[0]), float(scale[1])
        self.steps = None if scale_step is None else int((self.high - self.low) / scale_step + 1e-6) + 1
        self.step = scale_step or 0.0
        self.flip = flip
        self.colour = colour

    def __call__(self, image: Tensor, mask: Tensor, normalize: Normalize) -> tuple[Tensor, Tensor]:
        """A view of ``image`` uint8 ``[3, H, W]`` as float32, and of ``mask`` int16 ``[H, W]`` as int64."""
        chosen, across, down, turn = torch.rand(4).tolist()
        factors = (1 + self.colour * (2 * torch.rand(3) - 1)).tolist()
        if self.steps is None:
            factor = self.low + (self.high - self.low) * chosen
        else:
            factor = self.low + self.step * int(chosen * self.steps)
        height, width = (max(1, round(length * factor)) for length in mask.shape)
        if (height, width) != tuple(mask.shape):
            near = [_nearest(old, new) for old, new in zip(mask.shape, (height, width), strict=True)]
            image, mask = tv.resize(image, [height, width], antialias=False), mask[near[0]][:, near[1]]
        top = int(down * (max(height - self.size[0], 0) + 1))
        left = int(across * (max(width - self.size[1], 0) + 1))
        image = image[:, top : top + self.size[0], left : left + self.size[1]]
        mask = mask[top : top + self.size[0], left : left + self.size[1]]
        if self.flip and turn < 0.5:
            image, mask = image.flip(-1), mask.flip(-1)
        if self.colour:
            for change, amount in zip(
                (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation), factors, strict=True
            ):
                image = change(image, amount)
        part = normalize(image)
        if mask.shape == self.size:
            return part, mask.long()
        rows, columns = mask.shape
        whole, labels = part.new_zeros(len(part), *self.size), torch.full(self.size, -1)
        whole[:, :rows, :columns], labels[:rows, :columns] = part, mask.long()
        return whole, labels


def _nearest(old: int, new: int) -> Tensor:
    """For each of ``new`` pixels in a row, the index of the nearest of ``old`` pixels, int64 ``[new]``."""
    return ((torch.arange(new) + 0.5) * (old / new)).long().clamp(max=old - 1)


def check_sides(**sizes: Sequence[int]) -> None:
    """Raise a ``ValueError`` unless each argument is a height and a width, whole numbers above 0."""
    for name, size in sizes.items():
        if not isinstance(size, Sequence) or len(size) != 2:
            raise ValueError(f"{name} must be height and width, got {size!r}: give two whole numbers")
        for side in size:
            check_numbers({name: side}, least=1, whole=True)


class PairFiles:
    """Pairs of image and mask files: ``[index]`` gives uint8 ``[3, H, W]`` and int16 ``[H, W]``.

    Args:
        images: the image files.
        masks: the mask files; with ``None`` all masks are -1.
        table: maps the values in masks to classes.
        size: height and width that both are resized to. Default: no resizing.

    Raises:
        ValueError: from ``[index]``, where a file cannot be read, or an image and its mask differ in size.
    """

    def __init__(
        self,
        images: list[str],
        masks: list[str] | None,
        table: MaskTable,
        size: tuple[int, int] | None = None,
    ) -> None:
        self.images, self.masks, self.table, self.size = images, masks, table, size

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        picture = read_image(self.images[index])
        if self.size is not None and (picture.height, picture.width) != self.size:
            picture = picture.resize((self.size[1], self.size[0]), Image.Resampling.BILINEAR)
        image = tv.pil_to_tensor(picture)
        if self.masks is None:
            return image, torch.full(image.shape[1:], -1, dtype=torch.int16)
        mask = self.table.read(self.masks[index], self.size)
        if mask.shape != image.shape[1:]:
            raise ValueError(unlike(self.images[index], self.masks[index], tuple(image.shape[1:]), tuple(mask.shape)))
        return image, mask


def unlike(image: str, mask: str, image_size: tuple[int, ...], mask_size: tuple[int, ...]) -> str:
    """The error message for an image and a mask of different sizes."""
    sizes = [" x ".join(map(str, size)) for size in (image_size, mask_size)]
    return f"the image {image!r} is {sizes[0]} and its mask {mask!r} {sizes[1]} pixels: give a mask of the same size"


class PairTensors:
    """Pairs in memory, for use like ``PairFiles``: images uint8 ``[N, 3, H, W]`` and masks int16 ``[N, H, W]``."""

    def __init__(self, image: Tensor, target: Tensor) -> None:
        self.image, self.target = image, target

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.image[index], self.target[index]


class MaskedImages(Dataset[tuple[Tensor, Tensor, int]]):
    """Images with masks; ``[epoch, pass, index]`` draws a view from a random stream of its own, as ``ImageFiles``.

    Args:
        pairs: the images and masks.
        normalize: normalises images to float32.
        seed: of the random views.
        views: draws the random views; ``None`` for whole, unchanged images.
    """

    def __init__(
        self, pairs: PairFiles | PairTensors, normalize: Normalize, seed: int, views: JointViews | None = None
    ) -> None:
        self.pairs, self.normalize, self.seed, self.views = pairs, normalize, seed, views

    def __getitem__(self, key: Key) -> tuple[Tensor, Tensor, int]:
        epoch, pass_, index = key
        image, mask = self.pairs[index]
        if self.views is None:
            return self.normalize(image), mask.long(), index
        with sample_generator(self.seed, epoch, pass_, index):
            return *self.views(image, mask, self.normalize), index
