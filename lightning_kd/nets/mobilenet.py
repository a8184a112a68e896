"""MobileNetV1 (Howard et al., arXiv:1704.04861) and the half-width MobileNetV2 (Sandler et al., arXiv:1801.04381) of
the distillation literature. Tensors have the names of the public checkpoints."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_kd.nets._common import conv_bn_relu, global_pool, init_classifier, init_convolutions

# (out_channels, stride) of each depthwise-separable block
_SEPARABLE = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)]
# (expansion, out_channels, blocks, stride) of each stage, at half width; stride 1 in the second stage, where the paper
# has 2, which would reduce 32x32 images to one pixel
_INVERTED = [(1, 8, 1, 1), (6, 12, 2, 1), (6, 16, 3, 2), (6, 32, 4, 2), (6, 48, 3, 1), (6, 80, 3, 2), (6, 160, 1, 1)]


class MobileNetV1(nn.Module):
    """MobileNet of width 1 for 224x224 images (arXiv:1704.04861).

    ``model.0`` is the stem, ``model.1`` to ``model.13`` are the depthwise-separable blocks; the classifier is ``fc``.
    The last feature map has 1/32 of the image's height and width. Images ``[N, C, H, W]`` to logits
    ``[N, num_classes]``.

    Args:
        num_classes: number of logits.
        in_channels: channels of the images.
    """

    feature_stages = ("model.0", "model.3", "model.5", "model.11", "model.13")

    def __init__(self, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        blocks = [nn.Sequential(*conv_bn_relu(in_channels, 32, 3, stride=2))]
        channels = 32
        for out_channels, stride in _SEPARABLE:
            depthwise = conv_bn_relu(channels, channels, 3, stride, groups=channels)
            blocks.append(nn.Sequential(*depthwise, *conv_bn_relu(channels, out_channels, 1)))
            channels = out_channels
        self.model = nn.Sequential(*blocks)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(global_pool(self.model(x)))


class _InvertedResidual(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.residual = stride == 1 and in_channels == out_channels
        self.conv = nn.Sequential(
            *conv_bn_relu(in_channels, hidden, 1),
            *conv_bn_relu(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(nn.Module):
    """MobileNetV2 of width 0.5 and expansion 6 for 32x32 images (arXiv:1801.04381, with ReLU in place of ReLU6).

    Stages are ``blocks.0`` to ``blocks.6`` (of 16, 16, 8, 4, 4, 2 and 2 pixels a side for 32x32 images); the classifier
    is ``classifier``. Images ``[N, C, H, W]`` to logits ``[N, num_classes]``.

    Args:
        num_classes: number of logits.
        in_channels: channels of the images.
    """

    feature_stages = ("conv1", "blocks.1", "blocks.2", "blocks.4", "blocks.6")

    def __init__(self, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        channels = 16
        self.conv1 = nn.Sequential(*conv_bn_relu(in_channels, channels, 3, stride=2))
        stages = []
        for expansion, out_channels, count, stride in _INVERTED:
            blocks = [_InvertedResidual(channels, out_channels, stride, expansion)]
            blocks += [_InvertedResidual(out_channels, out_channels, 1, expansion) for _ in range(count - 1)]
            stages.append(nn.Sequential(*blocks))
            channels = out_channels
        self.blocks = nn.Sequential(*stages)
        self.conv2 = nn.Sequential(*conv_bn_relu(channels, 1280, 1))
        self.classifier = nn.Linear(1280, num_classes)
        init_convolutions(self)
        init_classifier(self.classifier)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(global_pool(self.conv2(self.blocks(self.conv1(x)))))
