"""Mixtures of two images of a batch: all of both (MixUp), or a box of one in the other (CutMix)."""

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
    """One mixing weight from Beta(alpha, alpha), taken to be at least 1/2, and a permutation of ``count`` partners.

    To replace a weight by its complement swaps the two images of every pair, whose order is random anyway: a sum over
    the batch has the same distribution, and the first image is always the dominant one.
    """
    weight = float(generator.beta(alpha, alpha))
    return max(weight, 1 - weight), torch.from_numpy(generator.permutation(count)).to(device)


def mix(tensor: Tensor, partner: Tensor, weight: float) -> Tensor:
    """``weight * tensor + (1 - weight) * tensor[partner]``, for the first ``len(partner)`` rows."""
    return torch.lerp(tensor[partner], tensor[: len(partner)], weight)


class Box(NamedTuple):
    """Pixels of an image: rows ``top`` to ``bottom - 1`` and columns ``left`` to ``right - 1``."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def area(self) -> int:
        """How many pixels."""
        return (self.bottom - self.top) * (self.right - self.left)


def draw_box(generator: np.random.Generator, alpha: float, height: int, width: int) -> Box:
    """The box of CutMix (Yun et al., ICCV 2019, arXiv 1905.04899): a share ``1 - Beta(alpha, alpha)`` of the area.

    Its sides are in the proportion of the image, its centre is anywhere, and what sticks out is cut off.
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
    """``image`` ``[B, C, H, W]`` with the pixels of ``image[partner]`` in the box, a new tensor."""
    mixed = image.clone()
    rows, columns = slice(box.top, box.bottom), slice(box.left, box.right)
    mixed[:, :, rows, columns] = image[partner][:, :, rows, columns]
    return mixed
