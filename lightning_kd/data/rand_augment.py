"""The strong view of multi-label images, for whole batches: a square of one random colour, then RandAugment."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lightning_kd.core.seeding import numpy_generator
from lightning_kd.data.auto_augment import OPERATIONS, UNSIGNED, BatchedAutoAugment, magnitude

__all__ = ["BatchedRandAugment"]


class BatchedRandAugment(BatchedAutoAugment):
    """Cutout with a uniform random colour, then RandAugment (Cubuk et al., arXiv 1909.13719) as in torchvision v2.

    The square has half the shorter side of the image, a uniform random pixel as its centre, and is clipped at the
    borders. Then two operations out of 14 (one of which changes nothing), all equally likely, with torchvision's
    defaults: magnitude 9 of 31, positive or negative with probability 1/2, nearest-neighbour interpolation, black
    outside. For the same draws images equal those of ``torchvision.transforms.v2.RandAugment``.
    """

    cuts_out = True
    bins, bin_ = 31, 9

    def __init__(self) -> None:
        names = [name for name in OPERATIONS if name != "Invert"]
        self.operations = [("", 0, 1)]
        self._code = np.array([[0, 0], *([self._number(name, self.bin_, sign) for sign in (1, -1)] for name in names)])

    def draw(self, count: int, seed: int, epoch: int = 0, pass_: int = 0) -> np.ndarray:
        """Draw the augmentation of ``count`` samples, from the stream ``(seed, "randaugment", epoch, pass)``.

        Returns:
            int64 ``[count, 7]``, the first and second operation as positions in ``operations``, three colour values (0
            to 255), and the centre of the square, row and column, in millionths of height and width.
        """
        generator = numpy_generator(seed, "randaugment", epoch, pass_)
        operation = generator.integers(0, len(self._code), (count, 2))
        code = self._code[operation, generator.integers(0, 2, (count, 2))]
        colour = generator.integers(0, 256, (count, 3))
        return np.concatenate([code, colour, generator.integers(0, 10**6, (count, 2))], 1)

    def apply(self, image: Tensor, choice: np.ndarray) -> Tensor:
        """Apply the drawn augmentation.

        Args:
            image: uint8 ``[B, C, H, W]`` of 1 or 3 channels.
            choice: int64 ``[B, 7]``, as ``draw`` returns it.

        Returns:
            uint8 ``[B, C, H, W]``, in new memory.
        """
        height, width = image.shape[-2:]
        side = min(height, width) // 2
        drawn = torch.from_numpy(choice[:, 2:]).to(image.device)
        colour = drawn[:, : image.shape[1]].to(torch.uint8)[:, :, None, None]
        first = [drawn[:, 3 + k] * length // 10**6 - side // 2 for k, length in enumerate((height, width))]
        inside = []
        for length, start in zip((height, width), first, strict=True):
            offset = torch.arange(length, device=image.device) - start[:, None]
            inside.append((offset >= 0) & (offset < side))
        box = inside[0][:, None, :, None] & inside[1][:, None, None, :]
        return super().apply(torch.where(box, colour, image), choice[:, :2])

    def _operate(self, image: Tensor, number: int) -> Tensor:
        name, bin_, sign = self.operations[number]
        size = (image.shape[-2], image.shape[-1])
        return OPERATIONS[name](image, (1 if name in UNSIGNED else sign) * magnitude(name, bin_, size, self.bins))
