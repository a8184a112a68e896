"""AutoAugment of whole batches: operations are drawn in advance, and each is applied to all its images at once."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import AutoAugment, AutoAugmentPolicy
from torchvision.transforms.v2 import functional as F

from lightning_kd.core.seeding import numpy_generator

BINS = 10  # number of magnitudes of an operation; policies number them from 0


def _affine(image: Tensor, translate: list[float] | None = None, shear: list[float] | None = None) -> Tensor:
    # AutoAugment shears about the top left corner; the centre does not matter for translations
    return F.affine(
        image, angle=0.0, translate=translate or [0, 0], scale=1.0, shear=shear or [0.0, 0.0], center=[0.0, 0.0]
    )


def _degrees(slope: float) -> float:
    return math.degrees(math.atan(slope))


# each operation as a function of the images and the magnitude m
OPERATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "ShearX": lambda x, m: _affine(x, shear=[_degrees(m), 0.0]),
    "ShearY": lambda x, m: _affine(x, shear=[0.0, _degrees(m)]),
    "TranslateX": lambda x, m: _affine(x, translate=[int(m), 0]),
    "TranslateY": lambda x, m: _affine(x, translate=[0, int(m)]),
    "Rotate": lambda x, m: F.rotate(x, m),
    "Brightness": lambda x, m: F.adjust_brightness(x, 1 + m),
    "Color": lambda x, m: F.adjust_saturation(x, 1 + m),
    "Contrast": lambda x, m: F.adjust_contrast(x, 1 + m),
    "Sharpness": lambda x, m: F.adjust_sharpness(x, 1 + m),
    "Posterize": lambda x, m: F.posterize(x, round(8 - m)),
    "Solarize": lambda x, m: F.solarize(x, 255 * (1 - m)),
    "AutoContrast": lambda x, m: F.autocontrast(x),
    "Equalize": lambda x, m: F.equalize(x),
    "Invert": lambda x, m: F.invert(x),
}
UNSIGNED = ("Posterize", "Solarize", "AutoContrast", "Equalize", "Invert")


def magnitude(name: str, bin_: int, size: tuple[int, int], bins: int = BINS) -> float:
    """The unsigned magnitude of an operation at a bin (0 to ``bins - 1``), for images of ``size`` (height, width)."""
    most = {
        "ShearX": 0.3,
        "ShearY": 0.3,
        "TranslateX": 150 / 331 * size[1],
        "TranslateY": 150 / 331 * size[0],
        "Rotate": 30.0,
        "Posterize": 4.0,
        "Solarize": 1.0,
    }.get(name, 0.9)
    return float(torch.linspace(0, most, bins)[bin_])  # float32 as in torchvision, for bitwise equal images


class BatchedAutoAugment:
    """AutoAugment (Cubuk et al., arXiv 1805.09501) with torchvision's policies, operations and magnitudes.

    Each image gets one random sub-policy of two operations. Each operation is applied with its own probability, and
    magnitudes with a direction are positive or negative with probability 1/2. For the same draws images equal those of
    ``torchvision.transforms.v2.AutoAugment`` with nearest-neighbour interpolation and black outside.

    Args:
        policy: one of torchvision's policies.
    """

    #: whether ``apply`` includes cutout
    cuts_out = False

    def __init__(self, policy: AutoAugmentPolicy = AutoAugmentPolicy.CIFAR10) -> None:
        self.policy = policy
        steps = AutoAugment(policy).policies
        #: name, bin and sign of each operation; position 0 stands for no operation
        self.operations: list[tuple[str, int, int]] = [("", 0, 1)]
        self._probability = np.array([[probability for _, probability, _ in pair] for pair in steps])
        self._code = np.array(
            [[[self._number(name, bin_, sign) for sign in (1, -1)] for name, _, bin_ in pair] for pair in steps]
        )

    def _number(self, name: str, bin_: int | None, sign: int) -> int:
        operation = (name, bin_ or 0, 1 if name in UNSIGNED else sign)
        if operation not in self.operations:
            self.operations.append(operation)
        return self.operations.index(operation)

    def draw(self, count: int, seed: int, epoch: int = 0, pass_: int = 0) -> np.ndarray:
        """Draw the two operations of each of ``count`` samples, from the stream ``(seed, "autoaugment", epoch, pass)``.

        Returns:
            int64 ``[count, 2]``, the first and the second operation as positions in ``operations``; 0 is no operation.
        """
        generator = numpy_generator(seed, "autoaugment", epoch, pass_)
        chosen = generator.integers(0, len(self._code), count)
        happens = generator.random((count, 2)) < self._probability[chosen]
        negative = generator.integers(0, 2, (count, 2))
        code = np.take_along_axis(self._code[chosen], negative[:, :, None], 2)[:, :, 0]
        return np.where(happens, code, 0)

    def apply(self, image: Tensor, choice: np.ndarray) -> Tensor:
        """Apply the drawn operations.

        Args:
            image: uint8 ``[B, C, H, W]`` of 1 or 3 channels.
            choice: int64 ``[B, 2]``, as ``draw`` returns it.

        Returns:
            uint8 ``[B, C, H, W]``, in new memory.
        """
        image = image.clone()
        for code in choice.T:
            # sorted by operation: one transfer to the device instead of one per operation
            order = torch.from_numpy(np.argsort(code, kind="stable")).to(image.device)
            counts = np.bincount(code, minlength=len(self.operations)).tolist()
            for number, rows in enumerate(order.split(counts)):
                if number and len(rows):
                    image.index_copy_(0, rows, self._operate(image.index_select(0, rows), number))
        return image

    def _operate(self, image: Tensor, number: int) -> Tensor:
        name, bin_, sign = self.operations[number]
        return OPERATIONS[name](image, sign * magnitude(name, bin_, (image.shape[-2], image.shape[-1])))
