"""A small segmentation network for CPUs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["FCNTiny"]


def _block(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU()
    )


class FCNTiny(nn.Module):
    """A fully convolutional network with a main and an auxiliary head, about 65,000 parameters.

    Three stages at 1/2, 1/4 and 1/4 of the size, the last one with dilation; the auxiliary head is on the second, as in
    torchvision's segmentation networks, whose outputs it gives too.

    Args:
        num_classes: logits of each pixel.
        in_channels: channels of the images.
    """

    def __init__(self, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        self.stage1 = nn.Sequential(_block(in_channels, 16, 2), _block(16, 16, 1))
        self.stage2 = nn.Sequential(_block(16, 32, 2), _block(32, 32, 1))
        dilated = nn.Conv2d(32, 64, 3, padding=2, dilation=2, bias=False)
        self.stage3 = nn.Sequential(dilated, nn.BatchNorm2d(64), nn.ReLU(), _block(64, 48, 1))
        self.classifier = nn.Conv2d(48 + 16, num_classes, 1)
        self.aux_classifier = nn.Conv2d(32, num_classes, 1)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """``out`` and ``aux``, both ``[N, num_classes, H, W]``, of images ``[N, C, H, W]``."""
        size = image.shape[-2:]
        fine = self.stage1(image)
        middle = self.stage2(fine)
        coarse = F.interpolate(self.stage3(middle), fine.shape[-2:], mode="bilinear", align_corners=False)
        heads = {"out": self.classifier(torch.cat([coarse, fine], 1)), "aux": self.aux_classifier(middle)}
        return {k: F.interpolate(v, size, mode="bilinear", align_corners=False) for k, v in heads.items()}
