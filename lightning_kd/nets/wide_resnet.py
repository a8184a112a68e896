"""Wide residual networks (Zagoruyko and Komodakis, arXiv:1605.07146), with the tensor names of public checkpoints."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_kd.nets._common import global_pool, init_convolutions


class _Block(nn.Module):
    """Batch normalisation and ReLU before each of two 3x3 convolutions, and a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        # as in the public networks a projection depends on the channels alone, so with width 1 the first stage has none
        self.convShortcut = (
            nn.Conv2d(in_channels, out_channels, 1, stride, bias=False) if in_channels != out_channels else None
        )

    def forward(self, x: Tensor) -> Tensor:
        active = self.relu1(self.bn1(x))
        out = self.conv2(self.relu2(self.bn2(self.conv1(active))))
        # a projection takes the activated input, the identity the input itself
        return out + (x if self.convShortcut is None else self.convShortcut(active))


class _Stage(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, blocks: int, stride: int) -> None:
        super().__init__()
        rest = [_Block(out_channels, out_channels, 1) for _ in range(blocks - 1)]
        self.layer = nn.Sequential(_Block(in_channels, out_channels, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WideResNet(nn.Module):
    """Wide ResNet of depth 6n + 4 (arXiv:1605.07146), without dropout.

    Stages are ``block1``, ``block2``, ``block3`` (their outputs are not yet normalised or activated); the classifier is
    ``fc``. Images ``[N, C, H, W]`` to logits ``[N, num_classes]``.

    Args:
        depth: 10, 16, 22, 28, 34, 40 ...
        width: factor on the 16, 32 and 64 channels of the stages.
        num_classes: number of logits.
        in_channels: channels of the images.

    Raises:
        ValueError: where ``depth`` is not 6n + 4 with n at least 1.
    """

    def __init__(self, depth: int, width: int, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        if depth < 10 or depth % 6 != 4:
            raise ValueError(f"depth of a wide ResNet must be 6n + 4 (10, 16, 22, 28, 34, 40 ...), got {depth}")
        blocks = (depth - 4) // 6
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.block1 = _Stage(16, 16 * width, blocks, stride=1)
        self.block2 = _Stage(16 * width, 32 * width, blocks, stride=2)
        self.block3 = _Stage(32 * width, 64 * width, blocks, stride=2)
        self.bn1 = nn.BatchNorm2d(64 * width)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(64 * width, num_classes)
        init_convolutions(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(global_pool(self.relu(self.bn1(x))))
