"""The nine-layer convolutional network of Co-teaching: Han et al., arXiv:1804.06872."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from lightning_kd.nets._common import global_pool, init_convolutions


def _stage(in_channels: int, widths: Sequence[int], padding: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in widths:
        layers += [nn.Conv2d(in_channels, width, 3, padding=padding), nn.BatchNorm2d(width), nn.LeakyReLU(0.01)]
        in_channels = width
    return nn.Sequential(*layers)


class CNN9(nn.Module):
    """Nine 3x3 convolutions, each with batch normalisation and leaky ReLU, and one linear layer (arXiv:1804.06872).

    Stages are ``layer1`` (three times 128 channels) and ``layer2`` (three times 256), each followed by 2x2 max pooling
    and dropout of a quarter of the channels, and ``layer3`` (512, 256 and 128 channels, without padding), followed by
    global average pooling; the classifier is ``linear``. Images ``[N, C, H, W]`` of at least 28x28 to logits
    ``[N, num_classes]``; ``forward`` raises a ValueError for smaller ones.

    Args:
        num_classes: number of logits.
        in_channels: channels of the images.
    """

    def __init__(self, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        self.layer1 = _stage(in_channels, (128, 128, 128), padding=1)
        self.pool1 = nn.MaxPool2d(2)
        self.dropout1 = nn.Dropout2d(0.25)
        self.layer2 = _stage(128, (256, 256, 256), padding=1)
        self.pool2 = nn.MaxPool2d(2)
        self.dropout2 = nn.Dropout2d(0.25)
        self.layer3 = _stage(256, (512, 256, 128), padding=0)
        self.linear = nn.Linear(128, num_classes)
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        if min(x.shape[2:]) < 28:
            raise ValueError(f"cnn9 takes images of at least 28x28, got {x.shape[2]}x{x.shape[3]}: use cnn instead")
        x = self.dropout1(self.pool1(self.layer1(x)))
        x = self.dropout2(self.pool2(self.layer2(x)))
        return self.linear(global_pool(self.layer3(x)))
