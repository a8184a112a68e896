"""Small segmentation networks that train on a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["FCN"]


def _block(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU()
    )


class FCN(nn.Module):
    """A fully convolutional network with a main and an auxiliary head.

    Three stages at 1/2, 1/4 and 1/4 of the size, the last one with dilation. The auxiliary head reads the second stage.
    Outputs are a dict of ``out`` and ``aux``, as of torchvision's segmentation networks.

    Args:
        widths: channels of the first two stages, and of the two convolutions of the third. With 16, 32, 64, 48 the
            network has about 65,000 parameters.
        num_classes: number of logits of each pixel.
        in_channels: channels of the images.
    """

    def __init__(self, widths: tuple[int, int, int, int], num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        first, second, third, last = widths
        self.stage1 = nn.Sequential(_block(in_channels, first, 2), _block(first, first, 1))
        self.stage2 = nn.Sequential(_block(first, second, 2), _block(second, second, 1))
        dilated = nn.Conv2d(second, third, 3, padding=2, dilation=2, bias=False)
        self.stage3 = nn.Sequential(dilated, nn.BatchNorm2d(third), nn.ReLU(), _block(third, last, 1))
        self.classifier = nn.Conv2d(last + first, num_classes, 1)
        self.aux_classifier = nn.Conv2d(second, num_classes, 1)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Images ``[N, C, H, W]`` to logits ``out`` and ``aux``, both ``[N, num_classes, H, W]``."""
        size = image.shape[-2:]
        fine = self.stage1(image)
        middle = self.stage2(fine)
        coarse = F.interpolate(self.stage3(middle), fine.shape[-2:], mode="bilinear", align_corners=False)
        heads = {"out": self.classifier(torch.cat([coarse, fine], 1)), "aux": self.aux_classifier(middle)}
        return {k: F.interpolate(v, size, mode="bilinear", align_corners=False) for k, v in heads.items()}
