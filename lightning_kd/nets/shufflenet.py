"""ShuffleNetV1 (Zhang et al., arXiv:1707.01083) and ShuffleNetV2 (Ma et al., arXiv:1807.11164) for 32x32 images: the
stem is a 1x1 convolution without stride or pooling. Tensors have the names of the public CIFAR checkpoints."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_kd.nets._common import global_pool

_STEM = 24


def _shuffle(x: Tensor, groups: int) -> Tensor:
    """Interleave the channels of ``groups`` groups."""
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


def _pointwise(in_channels: int, out_channels: int, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 1, groups=groups, bias=False)


def _depthwise(channels: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False)


class _UnitV1(nn.Module):
    """Residual unit; with stride 2 the pooled input is concatenated, not added.

    The convolutions then give the other ``out_channels - in_channels`` channels.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        branch = out_channels - in_channels if stride == 2 else out_channels
        middle = branch // 4
        # the first unit is not grouped: the stem has few channels
        self.groups = 1 if in_channels == _STEM else 3
        self.conv1 = _pointwise(in_channels, middle, self.groups)
        self.bn1 = nn.BatchNorm2d(middle)
        self.relu1 = nn.ReLU()
        self.conv2 = _depthwise(middle, stride)
        self.bn2 = nn.BatchNorm2d(middle)
        # The paper has no ReLU here; the public CIFAR networks have one.
        self.relu2 = nn.ReLU()
        self.conv3 = _pointwise(middle, branch, 3)
        self.bn3 = nn.BatchNorm2d(branch)
        self.pool = nn.AvgPool2d(3, stride=2, padding=1) if stride == 2 else None
        self.relu3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = _shuffle(self.relu1(self.bn1(self.conv1(x))), self.groups)
        out = self.bn3(self.conv3(self.relu2(self.bn2(self.conv2(out)))))
        return self.relu3(out + x if self.pool is None else torch.cat([out, self.pool(x)], 1))


class ShuffleNetV1(nn.Module):
    """ShuffleNet with 3 groups and 240, 480 and 960 channels (arXiv:1707.01083).

    Stages are ``layer1``, ``layer2``, ``layer3`` of 4, 8 and 4 units, each halving the size; the classifier is
    ``linear``. Images ``[N, C, H, W]`` to logits ``[N, num_classes]``.

    Args:
        num_classes: number of logits.
        in_channels: channels of the images.
    """

    def __init__(self, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        self.conv1 = _pointwise(in_channels, _STEM)
        self.bn1 = nn.BatchNorm2d(_STEM)
        self.relu = nn.ReLU()
        self.layer1 = self._stage(_STEM, 240, 4)
        self.layer2 = self._stage(240, 480, 8)
        self.layer3 = self._stage(480, 960, 4)
        self.linear = nn.Linear(960, num_classes)

    @staticmethod
    def _stage(in_channels: int, out_channels: int, units: int) -> nn.Sequential:
        rest = [_UnitV1(out_channels, out_channels, 1) for _ in range(units - 1)]
        return nn.Sequential(_UnitV1(in_channels, out_channels, 2), *rest)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        return self.linear(global_pool(self.layer3(self.layer2(self.layer1(x)))))


class _UnitV2(nn.Module):
    """Half of the channels go through the convolutions; the other half is passed on unchanged.

    That half is an output of ReLU, so the last ReLU does not change it; it is applied to both halves, so that a hook on
    it sees the unit's whole output.
    """

    feature_activation = "relu3"

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = _pointwise(half, half)
        self.bn1 = nn.BatchNorm2d(half)
        self.relu1 = nn.ReLU()
        self.conv2 = _depthwise(half, 1)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = _pointwise(half, half)
        self.bn3 = nn.BatchNorm2d(half)
        self.relu3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        kept, out = x.chunk(2, 1)
        out = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(out)))))
        return _shuffle(self.relu3(torch.cat([kept, self.bn3(self.conv3(out))], 1)), 2)


class _DownV2(nn.Module):
    """Two strided branches that take the whole input and give half of the output channels each."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        half = out_channels // 2
        self.conv1 = _depthwise(in_channels, 2)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv2 = _pointwise(in_channels, half)
        self.bn2 = nn.BatchNorm2d(half)
        self.relu2 = nn.ReLU()
        self.conv3 = _pointwise(in_channels, half)
        self.bn3 = nn.BatchNorm2d(half)
        self.relu3 = nn.ReLU()
        self.conv4 = _depthwise(half, 2)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = _pointwise(half, half)
        self.bn5 = nn.BatchNorm2d(half)
        self.relu5 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        left = self.relu2(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        right = self.bn4(self.conv4(self.relu3(self.bn3(self.conv3(x)))))
        right = self.relu5(self.bn5(self.conv5(right)))
        return _shuffle(torch.cat([left, right], 1), 2)


class ShuffleNetV2(nn.Module):
    """ShuffleNetV2 of size 1: 116, 232 and 464 channels (arXiv:1807.11164).

    Stages are ``layer1``, ``layer2``, ``layer3`` of 4, 8 and 4 units, each halving the size; the classifier is
    ``linear``. Images ``[N, C, H, W]`` to logits ``[N, num_classes]``.

    Args:
        num_classes: number of logits.
        in_channels: channels of the images.
    """

    def __init__(self, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        self.conv1 = _pointwise(in_channels, _STEM)
        self.bn1 = nn.BatchNorm2d(_STEM)
        self.relu1 = nn.ReLU()
        self.layer1 = self._stage(_STEM, 116, 4)
        self.layer2 = self._stage(116, 232, 8)
        self.layer3 = self._stage(232, 464, 4)
        self.conv2 = _pointwise(464, 1024)
        self.bn2 = nn.BatchNorm2d(1024)
        self.relu2 = nn.ReLU()
        self.linear = nn.Linear(1024, num_classes)

    @staticmethod
    def _stage(in_channels: int, out_channels: int, units: int) -> nn.Sequential:
        return nn.Sequential(_DownV2(in_channels, out_channels), *[_UnitV2(out_channels) for _ in range(units - 1)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(global_pool(self.relu2(self.bn2(self.conv2(x)))))
