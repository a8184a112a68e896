"""Residual networks for 32x32 images: narrow ones with three stages and wide ones with four.

He et al., "Deep Residual Learning for Image Recognition", arXiv:1512.03385. The three-stage networks are those of
section 4.2, but shortcuts that change the shape are 1x1 convolutions. resnet18, 34 and 50 are those of section 4.1, but
their stem is a 3x3 convolution without pooling. Tensors have the names of the public CIFAR checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from lightning_kd.nets._common import global_pool, init_convolutions


def _conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)


def _projection(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
        nn.BatchNorm2d(out_channels),
    )


class _CifarBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; public checkpoints of these networks name it ``downsample``."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_channels, out_channels, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = _conv3x3(out_channels, out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample = _projection(in_channels, out_channels, stride)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(out)) + self.downsample(x))


class CifarResNet(nn.Module):
    """ResNet of depth 6n + 2 with three stages (arXiv:1512.03385, section 4.2).

    Stages are ``layer1``, ``layer2``, ``layer3``; the classifier is ``fc``. Images ``[N, C, H, W]`` to logits
    ``[N, num_classes]``.

    Args:
        depth: 8, 14, 20, 32, 44, 56, 110.
        widths: channels of the stem and of the three stages.
        num_classes: number of logits.
        in_channels: channels of the images.
    """

    def __init__(self, depth: int, widths: Sequence[int], num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = _conv3x3(in_channels, widths[0])
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU()
        self.layer1 = self._stage(widths[0], widths[1], blocks, stride=1)
        self.layer2 = self._stage(widths[1], widths[2], blocks, stride=2)
        self.layer3 = self._stage(widths[2], widths[3], blocks, stride=2)
        self.fc = nn.Linear(widths[3], num_classes)
        init_convolutions(self)

    @staticmethod
    def _stage(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
        rest = [_CifarBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)]
        return nn.Sequential(_CifarBlock(in_channels, out_channels, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(global_pool(x))


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; public checkpoints of these networks name it ``shortcut``."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_channels, channels, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = _conv3x3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = _projection(in_channels, channels, stride)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(out)) + self.shortcut(x))


class _Bottleneck(nn.Module):
    """1x1, 3x3 (strided) and 1x1 convolutions; the output has four times ``channels``."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out_channels = self.expansion * channels
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = _conv3x3(channels, channels, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut = _projection(in_channels, out_channels, stride)
        self.relu3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.relu2(self.bn2(self.conv2(out)))
        return self.relu3(self.bn3(self.conv3(out)) + self.shortcut(x))


class ResNet(nn.Module):
    """resnet18, resnet34 or resnet50 with a 3x3 stem for small images (arXiv:1512.03385, section 4.1).

    Stages are ``layer1`` to ``layer4`` with 64 to 512 channels (four times as many for depth 50); the classifier is
    ``linear``. Images ``[N, C, H, W]`` to logits ``[N, num_classes]``.

    Args:
        depth: 18, 34 or 50.
        num_classes: number of logits.
        in_channels: channels of the images.
    """

    def __init__(self, depth: int, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        block: type[_BasicBlock] | type[_Bottleneck] = _Bottleneck if depth == 50 else _BasicBlock
        counts = (2, 2, 2, 2) if depth == 18 else (3, 4, 6, 3)
        width = 64 * block.expansion
        self.conv1 = _conv3x3(in_channels, 64)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        self.layer1 = self._stage(block, 64, 64, counts[0], stride=1)
        self.layer2 = self._stage(block, width, 128, counts[1], stride=2)
        self.layer3 = self._stage(block, 2 * width, 256, counts[2], stride=2)
        self.layer4 = self._stage(block, 4 * width, 512, counts[3], stride=2)
        self.linear = nn.Linear(8 * width, num_classes)
        init_convolutions(self)

    @staticmethod
    def _stage(
        block: type[_BasicBlock] | type[_Bottleneck], in_channels: int, channels: int, blocks: int, stride: int
    ) -> nn.Sequential:
        rest = [block(channels * block.expansion, channels, 1) for _ in range(blocks - 1)]
        return nn.Sequential(block(in_channels, channels, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.linear(global_pool(x))
