"""Small networks for feature vectors and for training on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from lightning_kd.nets._common import conv_bn_relu, global_pool, init_convolutions


class MLP(nn.Module):
    """Fully connected network: flatten, then a linear layer and ReLU for each hidden width, then the classifier ``fc``.

    Inputs ``[N, ...]`` with ``in_features`` values each to logits ``[N, num_classes]``. ``hidden.1``, ``hidden.3`` ...
    output the hidden layers after ReLU.

    Args:
        in_features: values of one input, D or C * H * W.
        num_classes: number of logits.
        hidden: widths of the hidden layers.
    """

    def __init__(self, in_features: int, num_classes: int, hidden: Sequence[int] = (128, 128)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in hidden:
            layers += [nn.Linear(in_features, width), nn.ReLU()]
            in_features = width
        self.hidden = nn.Sequential(*layers)
        self.fc = nn.Linear(in_features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.hidden(x.flatten(1)))


class CNN(nn.Module):
    """Three 3x3 convolutions of stride 2 with batch normalisation and ReLU, global average pooling and a linear layer.

    Stages are ``layer1``, ``layer2``, ``layer3``; the classifier is ``fc``. Images ``[N, C, H, W]`` to logits
    ``[N, num_classes]``.

    Args:
        widths: channels of the three convolutions.
        num_classes: number of logits.
        in_channels: channels of the images.
    """

    def __init__(self, widths: tuple[int, int, int], num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(*conv_bn_relu(in_channels, widths[0], 3, stride=2))
        self.layer2 = nn.Sequential(*conv_bn_relu(widths[0], widths[1], 3, stride=2))
        self.layer3 = nn.Sequential(*conv_bn_relu(widths[1], widths[2], 3, stride=2))
        self.fc = nn.Linear(widths[2], num_classes)
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(global_pool(self.layer3(self.layer2(self.layer1(x)))))
