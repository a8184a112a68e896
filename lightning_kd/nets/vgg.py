"""VGG with batch normalisation for small images: Simonyan and Zisserman, arXiv:1409.1556, and the VGG-8 of the
distillation literature (arXiv:1910.10699). One linear classifier; tensors have the names of the public CIFAR
checkpoints."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from lightning_kd.nets._common import global_pool, init_classifier, init_convolutions

_WIDTHS = (64, 128, 256, 512, 512)
_CONVOLUTIONS = {  # depth: number of convolutions in each of the five blocks
    8: (1, 1, 1, 1, 1),
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}


def _block(in_channels: int, out_channels: int, convolutions: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    widths = [in_channels] + [out_channels] * convolutions
    for narrow, wide in pairwise(widths):
        layers += [nn.Conv2d(narrow, wide, 3, padding=1), nn.BatchNorm2d(wide), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class VGG(nn.Module):
    """VGG with batch normalisation and one linear classifier (arXiv:1409.1556).

    ``block0`` to ``block4`` end before their last ReLU; ``relu0`` to ``relu4`` output the stages after ReLU. 2x2 max
    pooling follows blocks 0, 1 and 2, and block 3 too for images at least 64 pixels high; smaller images would leave
    block 4 too few pixels. Global average pooling follows block 4. Images ``[N, C, H, W]`` (at least 8x8) to logits
    ``[N, num_classes]``.

    Args:
        depth: 8, 11, 13, 16 or 19.
        num_classes: number of logits.
        in_channels: channels of the images.
    """

    feature_stages = ("relu0", "relu1", "relu2", "relu3", "relu4")

    def __init__(self, depth: int, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        counts = _CONVOLUTIONS[depth]
        self.block0 = _block(in_channels, _WIDTHS[0], counts[0])
        self.block1 = _block(_WIDTHS[0], _WIDTHS[1], counts[1])
        self.block2 = _block(_WIDTHS[1], _WIDTHS[2], counts[2])
        self.block3 = _block(_WIDTHS[2], _WIDTHS[3], counts[3])
        self.block4 = _block(_WIDTHS[3], _WIDTHS[4], counts[4])
        self.relu0, self.relu1, self.relu2, self.relu3, self.relu4 = (nn.ReLU() for _ in range(5))
        self.pool = nn.MaxPool2d(2)
        self.classifier = nn.Linear(_WIDTHS[4], num_classes)
        init_convolutions(self)
        init_classifier(self.classifier)

    def forward(self, x: Tensor) -> Tensor:
        large = x.shape[2] >= 64
        x = self.pool(self.relu0(self.block0(x)))
        x = self.pool(self.relu1(self.block1(x)))
        x = self.pool(self.relu2(self.block2(x)))
        x = self.relu3(self.block3(x))
        if large:
            x = self.pool(x)
        x = self.relu4(self.block4(x))
        return self.classifier(global_pool(x))
