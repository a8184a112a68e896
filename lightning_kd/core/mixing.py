"""Mixing pairs of images of a batch: a weighted sum (MixUp), or a box of one in the other (CutMix)."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["Box", "cut_mix", "draw_box", "draw_mix", "mix"]


def draw_mix(
    generator: np.random.Generator, alpha: float, count: int, device: torch.device | str = "cpu"
) -> tuple[float, Tensor]:
    """Draw a mixing weight from Beta(alpha, alpha) and a random permutation of ``count`` partners.

    A weight below 1/2 is replaced by its complement, so that the first image of a pair always has the larger weight.
    This swaps the two images of every pair; as the pairs are random, sums over the batch keep their distribution.

    Args:
        generator: source of random numbers.
        alpha: parameter of the Beta distribution, above 0.
        count: size of the batch.
        device: device of the permutation.

    Returns:
        ``(weight, partner)``: a float in [1/2, 1] and int64 ``[count]``.
    """
    weight = float(generator.beta(alpha, alpha))
    return max(weight, 1 - weight), torch.from_numpy(generator.permutation(count)).to(device)


def mix(tensor: Tensor, partner: Tensor, weight: float) -> Tensor:
    """``weight * tensor + (1 - weight) * tensor[partner]``, of the first ``len(partner)`` rows of ``tensor``.

    Args:
        tensor: ``[B, ...]``.
        partner: int64 ``[n]`` with ``n`` at most ``B``, see ``draw_mix``.
        weight: the weight of the first image of each pair.

    Returns:
        ``[n, ...]``.
    """
    return torch.lerp(tensor[partner], tensor[: len(partner)], weight)


class Box(NamedTuple):
    """A box in an image: rows ``top`` to ``bottom - 1`` and columns ``left`` to ``right - 1``, in pixels."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def area(self) -> int:
        """Number of pixels."""
        return (self.bottom - self.top) * (self.right - self.left)


def draw_box(generator: np.random.Generator, alpha: float, height: int, width: int) -> Box:
    """Draw the box of CutMix (Yun et al., ICCV 2019, arXiv 1905.04899).

    Its area is the share ``1 - Beta(alpha, alpha)`` of the image, its sides are in the image's proportion, and its
    centre is uniform over the image; parts outside of the image are cut off.

    Args:
        generator: source of random numbers.
        alpha: parameter of the Beta distribution, above 0.
        height: height of the image in pixels.
        width: width of the image in pixels.
    """
    side = math.sqrt(1 - float(generator.beta(alpha, alpha)))
    half_height, half_width = int(height * side) // 2, int(width * side) // 2
    row, column = int(generator.integers(height)), int(generator.integers(width))
    return Box(
        max(row - half_height, 0),
        min(row + half_height, height),
        max(column - half_width, 0),
        min(column + half_width, width),
    )


def cut_mix(image: Tensor, partner: Tensor, box: Box) -> Tensor:
    """A copy of ``image`` ``[B, C, H, W]`` with the pixels of ``image[partner]`` in the box.

    Args:
        image: ``[B, C, H, W]``.
        partner: int64 ``[B]``, the other image of each pair.
        box: the box, see ``draw_box``.
    """
    mixed = image.clone()
    rows, columns = slice(box.top, box.bottom), slice(box.left, box.right)
    mixed[:, :, rows, columns] = image[partner][:, :, rows, columns]
    return mixed
