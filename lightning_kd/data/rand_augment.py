"""The strong view of images with several labels, for whole batches: a box of one colour, then RandAugment."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lightning_kd.core.seeding import numpy_generator
from lightning_kd.data.auto_augment import OPERATIONS, UNSIGNED, BatchedAutoAugment, magnitude

__all__ = ["BatchedRandAugment"]


class BatchedRandAugment(BatchedAutoAugment):
    """Cutout with a uniform random colour, then RandAugment (Cubuk et al., arXiv 1909.13719) as torchvision v2 has it.

    The box has half the shorter side and is clipped at the borders; its centre is any pixel. Then two operations out of
    14, nothing at all among them, each equally likely, with torchvision's defaults: magnitude 9 of 31, positive or
    negative equally often, nearest neighbours, black outside. For the same draws the images are those of
    ``torchvision.transforms.v2.RandAugment``.
    """

    cuts_out = True
    bins, bin_ = 31, 9

    def __init__(self) -> None:
        names = [name for name in OPERATIONS if name != "Invert"]
        self.operations = [("", 0, 1)]
        self._code = np.array([[0, 0], *([self._number(name, self.bin_, sign) for sign in (1, -1)] for name in names)])

    def draw(self, count: int, seed: int, epoch: int = 0, pass_: int = 0) -> np.ndarray:
        """What happens to each of ``count`` samples, from the stream ``(seed, "randaugment", epoch, pass)``.

        Returns:
            int64 ``[count, 7]``: the first and second operation as positions in ``operations``, three values of colour
            (0 to 255), and the centre of the box, row and column, in millionths of the height and width.
        """
        generator = numpy_generator(seed, "randaugment", epoch, pass_)
        operation = generator.integers(0, len(self._code), (count, 2))
        code = self._code[operation, generator.integers(0, 2, (count, 2))]
        colour = generator.integers(0, 256, (count, 3))
        return np.concatenate([code, colour, generator.integers(0, 10**6, (count, 2))], 1)

    def apply(self, image: Tensor, choice: np.ndarray) -> Tensor:
        """Do what was drawn.

        Args:
            image: uint8 ``[B, C, H, W]`` of 1 or 3 channels.
            choice: int64 ``[B, 7]``, from ``draw``.

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
