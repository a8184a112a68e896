"""Random crop, flip and cutout of whole batches of images, drawn in advance for every sample of an epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import resize

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.seeding import derive_seed, numpy_generator

VIEWS = ("plain", "weak", "strong")
# names that stand for several views, of the whole image and of its cells, and the kind of each of these views
PATCHES = {"patches": "plain", "strong_patches": "strong"}


def check_views(
    views: str | Sequence[str], shape: tuple[int, ...], masks: bool = False, n_grid: int | None = None
) -> tuple[str, ...]:
    """The names of views as a tuple, after checks against samples of ``shape``.

    Raises:
        ValueError: for no view, an unknown one, strong views or patches of samples that are not images of 1 or 3
            channels; with ``masks``, for several views or a strong one; for patches of images whose sides ``n_grid``
            does not divide.
    """
    names = (views,) if isinstance(views, str) else tuple(views)
    known = VIEWS if n_grid is None else (*VIEWS, *PATCHES)
    if not names or any(name not in known for name in names):
        raise ValueError(
            f"views must name at least one of {', '.join(map(repr, known[:-1]))} and {known[-1]!r}, got {views!r}: "
            "correct the names"
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
    """All views to make for ``views``, in order: the kind of each, and the cell that it shows (``None``: the image).

    ``"patches"`` and ``"strong_patches"`` are ``1 + n_grid ** 2`` views: the whole image, then its cells, row by row.
    """
    cells = [None, *range((n_grid or 0) ** 2)]
    return [(PATCHES.get(name, name), cell) for name in views for cell in (cells if name in PATCHES else [None])]


def cut_cell(image: Tensor, cell: int, n_grid: int) -> Tensor:
    """One of ``n_grid`` x ``n_grid`` equal cells of each image, counted row by row, resized to the image's size.

    Args:
        image: uint8 ``[B, C, H, W]``; ``n_grid`` divides ``H`` and ``W``.
        cell: 0 to ``n_grid ** 2 - 1``.
        n_grid: cells per row and per column.

    Returns:
        uint8 ``[B, C, H, W]``, by bilinear interpolation.
    """
    height, width = image.shape[-2] // n_grid, image.shape[-1] // n_grid
    top, left = cell // n_grid * height, cell % n_grid * width
    return resize(image[..., top : top + height, left : left + width], list(image.shape[-2:]), antialias=True)


def view_seed(seed: int, view: int) -> int:
    """The seed of the ``view``-th view of every sample; for view 0 it is ``seed`` itself."""
    return derive_seed(seed, f"view/{view}") if view else seed


@dataclass(frozen=True)
class CropFlip:
    """Random crops of images padded with black, and left-right flips with probability 1/2.

    There are ``(2 * padding + 1) ** 2`` crops, times 2 with flips (162 for ``padding=4``), all equally likely. Each
    such combination is a *view* and has a number.

    Args:
        padding: black pixels added on every side, which is also the largest shift of a crop.
        flip: also flip half of the images left-right.

    Raises:
        ValueError: for a ``padding`` that is not a whole number from 0 on.
    """

    padding: int = 4
    flip: bool = True

    def __post_init__(self) -> None:
        check_numbers(least=0, whole=True, padding=self.padding)

    @property
    def views(self) -> int:
        """Number of different views of an image."""
        return (2 * self.padding + 1) ** 2 * (1 + self.flip)

    def draw(self, count: int, seed: int, epoch: int = 0, pass_: int = 0, among: int | None = None) -> Tensor:
        """Draw the view of each of ``count`` samples, int64 ``[count]``.

        From the stream ``(seed, "augment", epoch, pass)``. With ``among``, draw numbers below ``among`` instead, to
        choose from that many fixed views.
        """
        views = self.views if among is None else among
        return torch.from_numpy(numpy_generator(seed, "augment", epoch, pass_).integers(0, views, count))

    def decode(self, view: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Row offset, column offset (int64, 0 to ``2 * padding``) and flip (bool) of each view, all ``[B]``."""
        crop = view // 2 if self.flip else view
        side = 2 * self.padding + 1
        return crop // side, crop % side, (view % 2 if self.flip else torch.zeros_like(view)).bool()

    def pad(self, image: Tensor, fill: int = 0) -> Tensor:
        """Pad ``[N, C, H, W]`` by ``fill`` to ``[N, C, H + 2 * padding, W + 2 * padding]``, contiguous."""
        p, (height, width) = self.padding, image.shape[-2:]
        padded = image.new_full((*image.shape[:2], height + 2 * p, width + 2 * p), fill)
        padded[:, :, p : p + height, p : p + width] = image
        return padded

    def gather(self, padded: Tensor, index: Tensor, view: Tensor) -> Tensor:
        """Cut one view out of each of some padded images.

        Args:
            padded: ``[N, C, H + 2 * padding, W + 2 * padding]``, contiguous, as ``pad`` returns it.
            index: int64 ``[B]``, positions of the images in ``padded``.
            view: int64 ``[B]``, the view of each.

        Returns:
            ``[B, C, H, W]``, contiguous, of the dtype of ``padded``.
        """
        _, channels, padded_height, padded_width = padded.shape
        height, width = padded_height - 2 * self.padding, padded_width - 2 * self.padding
        y, x, flip = self.decode(view)
        # `runs` is an overlapping view whose row k is the `width` values from position k on. A crop is a selection of
        # such rows, and index_select copies whole rows, several times faster than gathering single elements.
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
    """Convert stored samples to float32, subtract the mean and divide by the standard deviation.

    Args:
        mean: one value per channel (or feature); for uint8 images in units of the full scale, 0 to 1.
        std: likewise the standard deviation, above 0.
        shape: the shape of one sample, ``(C, H, W)`` or ``(D,)``.
        full_scale: the stored value that counts as 1: 255 for uint8 images, 1 for features.
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
        """Normalise ``[B, ...]`` of any real dtype to float32 of the same shape, in new memory."""
        return sample.to(torch.float32, copy=True).mul_(self.scale).add_(self.shift)


def draw_centres(count: int, size: tuple[int, int], seed: int, epoch: int = 0, pass_: int = 0) -> Tensor:
    """Draw the centre (row, column) of each sample's cutout square, int64 ``[count, 2]``, uniformly over all pixels.

    From the stream ``(seed, "cutout", epoch, pass)``; ``size`` is height and width of the images.
    """
    return torch.from_numpy(numpy_generator(seed, "cutout", epoch, pass_).integers(0, size, (count, 2)))


def cut_out_(image: Tensor, centre: Tensor, side: int) -> Tensor:
    """Set a square of ``side`` x ``side`` pixels to 0, in place; after normalisation 0 is the mean colour.

    Args:
        image: float ``[B, C, H, W]``.
        centre: int64 ``[B, 2]``, row and column. The square begins ``side // 2`` before it and is clipped at the
            borders.
        side: side of the square in pixels.
    """

    def inside(length: int, middle: Tensor) -> Tensor:
        offset = torch.arange(length, device=image.device) - (middle[:, None] - side // 2)
        return (offset >= 0) & (offset < side)

    rows, columns = inside(image.shape[-2], centre[:, 0]), inside(image.shape[-1], centre[:, 1])
    return image.masked_fill_((rows[:, :, None] & columns[:, None, :])[:, None], 0.0)


class RandomCutout(torch.nn.Module):
    """Set a square of ``side`` x ``side`` pixels around a random pixel of a ``[C, H, W]`` image to 0, in place."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, image: Tensor) -> Tensor:
        centre = [torch.randint(length, (1, 1)) for length in image.shape[-2:]]
        return cut_out_(image[None], torch.cat(centre, 1), self.side)[0]
