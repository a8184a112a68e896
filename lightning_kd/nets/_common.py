"""Layers and initialisations that several networks use."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def global_pool(x: Tensor) -> Tensor:
    """Global average pooling: ``[N, C, H, W]`` to ``[N, C]``."""
    return F.adaptive_avg_pool2d(x, 1).flatten(1)


def init_convolutions(network: nn.Module) -> None:
    """Kaiming normal weights by fan-out (arXiv:1502.01852) and zero biases, in place."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def init_classifier(classifier: nn.Linear) -> None:
    """Normal weights with standard deviation 0.01 and zero biases, in place."""
    nn.init.normal_(classifier.weight, std=0.01)
    nn.init.zeros_(classifier.bias)


def conv_bn_relu(
    in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    """Convolution (padded to keep the size at stride 1), batch normalisation and ReLU, for ``nn.Sequential``."""
    return [
        nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    ]
