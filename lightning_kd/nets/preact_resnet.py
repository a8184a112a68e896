"""Pre-activation ResNet-18 for 32x32 images: the network of DivideMix, ELR+ and DPC.

He et al., "Identity Mappings in Deep Residual Networks", arXiv:1603.05027. As in the public code for noisy labels, and
unlike in the paper, the stem is followed by batch normalisation and ReLU, and the last block is not. Tensors have the
names of that code.
"""

from __future__ import annotations

from torch import Tensor, nn

from lightning_kd.nets._common import global_pool, init_convolutions


class _PreActBlock(nn.Module):
    """Batch normalisation and ReLU before each of two 3x3 convolutions; the shortcut also takes the activated input."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        # an empty Sequential is the identity
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != channels:
            self.shortcut.append(nn.Conv2d(in_channels, channels, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        active = self.relu1(self.bn1(x))
        out = self.conv2(self.relu2(self.bn2(self.conv1(active))))
        return out + self.shortcut(active)


class PreActResNet18(nn.Module):
    """Pre-activation ResNet-18 with a 3x3 stem (arXiv:1603.05027).

    Stages are ``layer1`` to ``layer4`` of two blocks with 64, 128, 256 and 512 channels. Their outputs are residual
    sums without normalisation or ReLU; that of ``layer4`` is average-pooled. The classifier is ``linear``. Images
    ``[N, C, H, W]`` to logits ``[N, num_classes]``.

    Args:
        num_classes: number of logits.
        in_channels: channels of the images.
    """

    def __init__(self, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        self.layer1 = nn.Sequential(_PreActBlock(64, 64, 1), _PreActBlock(64, 64, 1))
        self.layer2 = nn.Sequential(_PreActBlock(64, 128, 2), _PreActBlock(128, 128, 1))
        self.layer3 = nn.Sequential(_PreActBlock(128, 256, 2), _PreActBlock(256, 256, 1))
        self.layer4 = nn.Sequential(_PreActBlock(256, 512, 2), _PreActBlock(512, 512, 1))
        self.linear = nn.Linear(512, num_classes)
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        return self.linear(global_pool(self.layer4(self.layer3(self.layer2(self.layer1(x))))))
