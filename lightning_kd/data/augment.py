"""Augmentation of whole batches of images: one random view per sample, drawn ahead for every sample of an epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import resize

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.seeding import derive_seed, numpy_generator

VIEWS = ("plain", "weak", "strong")
# what stands for the whole image and its cells, each as the view named here
PATCHES = {"patches": "plain", "strong_patches": "strong"}


def check_views(
    views: str | Sequence[str], shape: tuple[int, ...], masks: bool = False, n_grid: int | None = None
) -> tuple[str, ...]:
    """The names as a tuple, checked against samples of ``shape``.

    Raises:
        ValueError: for no view, an unknown one, strong views of what is no image of 1 or 3 channels, and with ``masks``
            several views or a strong one; patches without ``n_grid``, and of images that it does not divide.
    """
    names = (views,) if isinstance(views, str) else tuple(views)
    known = VIEWS if n_grid is None else (*VIEWS, *PATCHES)
    if not names or any(name not in known for name in names):
        raise ValueError(
            f"views must name at least one of {', '.join(map(repr, known[:-1]))} and {known[-1]!r}, got {views!r}: "
            "give such names"
        )
    if masks and (len(names) > 1 or "strong" in names):
        raise ValueError(f"views={views!r} cannot go with masks: give 'plain' or 'weak' alone")
    if {"strong", *PATCHES} & {*names} and (len(shape) != 3 or shape[0] not in (1, 3)):
        raise ValueError(
            f"views={views!r} needs images of 1 or 3 channels for 'strong' and patches, got samples of shape "
            f"{tuple(shape)}: use 'weak' or 'plain' views"
        )
    if {*PATCHES} & {*names} and (shape[1] % n_grid or shape[2] % n_grid):  # type: ignore[operator]
        raise ValueError(
            f"n_grid={n_grid} must divide height and width of the images, {shape[1]} x {shape[2]}: give another one"
        )
    return names


def expand_views(views: Sequence[str], n_grid: int | None = None) -> list[tuple[str, int | None]]:
    """Each view that is made for ``views``, in order: its name, and which cell of the image it is of, or ``None``.

    ``"patches"`` and ``"strong_patches"`` are ``1 + n_grid ** 2`` views: the whole image, then its cells, row by row.
    """
    cells = [None, *range((n_grid or 0) ** 2)]
    return [(PATCHES.get(name, name), cell) for name in views for cell in (cells if name in PATCHES else [None])]


def cut_cell(image: Tensor, cell: int, n_grid: int) -> Tensor:
    """One of ``n_grid`` x ``n_grid`` equal cells of each image, counted row by row, brought to its size (bilinear).

    Args:
        image: uint8 ``[B, C, H, W]``; ``n_grid`` divides ``H`` and ``W``.
        cell: 0 to ``n_grid ** 2 - 1``.
        n_grid: cells in a row and in a column.
    """
    height, width = image.shape[-2] // n_grid, image.shape[-1] // n_grid
    top, left = cell // n_grid * height, cell % n_grid * width
    return resize(image[..., top : top + height, left : left + width], list(image.shape[-2:]), antialias=True)


def view_seed(seed: int, view: int) -> int:
    """The seed of the ``view``-th view of each sample; that of the first one is ``seed`` itself."""
    return derive_seed(seed, f"view/{view}") if view else seed


@dataclass(frozen=True)
class CropFlip:
    """Pad with black, crop back at a random offset, flip left-right with probability 1/2.

    All ``views`` are equally likely, ``(2 * padding + 1) ** 2`` crops times 2 with the flip: 162 for ``padding=4``.

    Args:
        padding: black pixels added on every side, and so the largest shift.
        flip: draw a left-right flip too.

    Raises:
        ValueError: for a ``padding`` that is no whole number from 0 on.
    """

    padding: int = 4
    flip: bool = True

    def __post_init__(self) -> None:
        check_numbers(least=0, whole=True, padding=self.padding)

    @property
    def views(self) -> int:
        """How many different views an image has."""
        return (2 * self.padding + 1) ** 2 * (1 + self.flip)

    def draw(self, count: int, seed: int, epoch: int = 0, pass_: int = 0, among: int | None = None) -> Tensor:
        """The view of each of ``count`` samples, int64 ``[count]``, from the stream ``(seed, "augment", ...)``.

        With ``among`` a number below that instead, of so many views that are fixed elsewhere.
        """
        views = self.views if among is None else among
        return torch.from_numpy(numpy_generator(seed, "augment", epoch, pass_).integers(0, views, count))

    def decode(self, view: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The parts of a view: row offset, column offset (both int64, 0 to ``2 * padding``) and flip (bool)."""
        crop = view // 2 if self.flip else view
        side = 2 * self.padding + 1
        return crop // side, crop % side, (view % 2 if self.flip else torch.zeros_like(view)).bool()

    def pad(self, image: Tensor, fill: int = 0) -> Tensor:
        """``[N, C, H, W]`` to ``[N, C, H + 2 * padding, W + 2 * padding]``, ``fill`` around, contiguous."""
        p, (height, width) = self.padding, image.shape[-2:]
        padded = image.new_full((*image.shape[:2], height + 2 * p, width + 2 * p), fill)
        padded[:, :, p : p + height, p : p + width] = image
        return padded

    def gather(self, padded: Tensor, index: Tensor, view: Tensor) -> Tensor:
        """One view of each of some images.

        Args:
            padded: ``[N, C, H + 2 * padding, W + 2 * padding]``, contiguous, as ``pad`` returns it.
            index: int64 ``[B]``, which images.
            view: int64 ``[B]``, which view of each.

        Returns:
            ``[B, C, H, W]``, contiguous, of the dtype of ``padded``.
        """
        _, channels, padded_height, padded_width = padded.shape
        height, width = padded_height - 2 * self.padding, padded_width - 2 * self.padding
        y, x, flip = self.decode(view)
        # Every run of `width` bytes as a row of an overlapping view: then a crop is a choice of whole rows, which
        # index_select copies in one piece, several times faster than element by element.
        runs = padded.view(-1).as_strided((padded.numel() - width + 1, width), (1, 1))
        channel = torch.arange(channels, device=padded.device) * (padded_height * padded_width)
        row = torch.arange(height, device=padded.device) * padded_width
        first = (channel[:, None] + row).view(-1)
        start = index * (channels * padded_height * padded_width) + y * padded_width + x
        image = runs.index_select(0, (start[:, None] + first).view(-1)).view(-1, channels, height, width)
        if not self.flip:
            return image
        both = torch.cat([image, image.flip(-1)])
        return both.index_select(0, torch.arange(len(index), device=index.device) + flip * len(index))


class Normalize:
    """Bring stored samples to float32 with mean 0 and standard deviation 1.

    Args:
        mean: one value a channel (or feature); for uint8 images in units of the full scale, 0 to 1.
        std: likewise, above 0.
        shape: the shape of one sample, ``(C, H, W)`` or ``(D,)``.
        full_scale: what counts as 1 in the stored values: 255 for uint8 images, 1 for features.
    """

    def __init__(self, mean: list[float], std: list[float], shape: tuple[int, ...], full_scale: float = 255.0) -> None:
        spread = torch.tensor(std, dtype=torch.float64).view(-1, *[1] * (len(shape) - 1))
        centre = torch.tensor(mean, dtype=torch.float64).view_as(spread)
        self.scale = (1 / (full_scale * spread)).float()
        self.shift = (-centre / spread).float()

    def to(self, device: str | torch.device) -> Normalize:
        """Move the constants to ``device``, in place."""
        self.scale, self.shift = self.scale.to(device), self.shift.to(device)
        return self

    def __call__(self, sample: Tensor) -> Tensor:
        """``[B, ...]`` of any real dtype to float32 of the same shape, in new memory."""
        return sample.to(torch.float32, copy=True).mul_(self.scale).add_(self.shift)


def draw_centres(count: int, size: tuple[int, int], seed: int, epoch: int = 0, pass_: int = 0) -> Tensor:
    """The centre (row, column) of each sample's cutout box, int64 ``[count, 2]``, uniform over the pixels of ``size``.

    From the stream ``(seed, "cutout", epoch, pass)``.
    """
    return torch.from_numpy(numpy_generator(seed, "cutout", epoch, pass_).integers(0, size, (count, 2)))


def cut_out_(image: Tensor, centre: Tensor, side: int) -> Tensor:
    """Set a box of ``side`` x ``side`` pixels to 0, in place: after normalisation that is the mean colour.

    Args:
        image: float ``[B, C, H, W]``.
        centre: int64 ``[B, 2]``, row and column; the box starts ``side // 2`` before it and is clipped at the borders.
        side: its side in pixels.
    """

    def inside(length: int, middle: Tensor) -> Tensor:
        offset = torch.arange(length, device=image.device) - (middle[:, None] - side // 2)
        return (offset >= 0) & (offset < side)

    rows, columns = inside(image.shape[-2], centre[:, 0]), inside(image.shape[-1], centre[:, 1])
    return image.masked_fill_((rows[:, :, None] & columns[:, None, :])[:, None], 0.0)


class RandomCutout(torch.nn.Module):
    """Set a box of ``side`` x ``side`` pixels around a random pixel of a ``[C, H, W]`` image to 0, in place."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, image: Tensor) -> Tensor:
        centre = [torch.randint(length, (1, 1)) for length in image.shape[-2:]]
        return cut_out_(image[None], torch.cat(centre, 1), self.side)[0]
