"""Networks by name: the CIFAR families of the papers, small ones, ``timm/NAME`` and ``torchvision/NAME``.

Every network takes a batch and returns plain logits ``[N, num_classes]``; the input of its last ``nn.Linear`` is the
pooled feature, and its stages are submodules (``layer1``, ``block1``, ``blocks.0`` ...) that hooks can be put on. Where
their names do not say which are the stages that benchmarks compare, ``feature_stages`` names them, the stem first. No
operation is in place, so that what a hook kept stays as it was.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn

from lightning_kd.nets.cifar_resnet import CifarResNet, ResNet
from lightning_kd.nets.cnn9 import CNN9
from lightning_kd.nets.library_networks import timm_network, torchvision_network, unknown_network
from lightning_kd.nets.ml_decoder import MLDecoder, MLDecoderNetwork, with_ml_decoder
from lightning_kd.nets.mobilenet import MobileNetV1, MobileNetV2
from lightning_kd.nets.preact_resnet import PreActResNet18
from lightning_kd.nets.segmentation import FCN
from lightning_kd.nets.shufflenet import ShuffleNetV1, ShuffleNetV2
from lightning_kd.nets.small_networks import CNN, MLP
from lightning_kd.nets.vgg import VGG
from lightning_kd.nets.wide_resnet import WideResNet

__all__ = [
    "MLDecoder",
    "MLDecoderNetwork",
    "build_network",
    "network_for",
    "network_names",
    "segmentation_network_names",
    "split_head",
    "with_ml_decoder",
]

_NARROW = (16, 16, 32, 64)
_WIDE = (32, 64, 128, 256)

# Each is called with num_classes and in_channels.
_NETWORKS: dict[str, Callable[[int, int], nn.Module]] = {
    **{f"resnet{depth}": partial(CifarResNet, depth, _NARROW) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{depth}x4": partial(CifarResNet, depth, _WIDE) for depth in (8, 32)},
    **{f"resnet{depth}": partial(ResNet, depth) for depth in (18, 34, 50)},
    "preact_resnet18": PreActResNet18,
    **{f"wrn_{depth}_{width}": partial(WideResNet, depth, width) for depth in (16, 40) for width in (1, 2)},
    **{f"vgg{depth}": partial(VGG, depth) for depth in (8, 11, 13, 16, 19)},
    "mobilenetv1": MobileNetV1,
    "mobilenetv2": MobileNetV2,
    "shufflenetv1": ShuffleNetV1,
    "shufflenetv2": ShuffleNetV2,
    "cnn9": CNN9,
    "cnn": partial(CNN, (32, 64, 128)),
    "cnn_tiny": partial(CNN, (8, 16, 32)),
}
# These give ``out`` and ``aux``, a score for each class and pixel.
_SEGMENTATION: dict[str, Callable[[int, int], nn.Module]] = {
    "fcn_tiny": partial(FCN, (16, 32, 64, 48)),
    "fcn_small": partial(FCN, (32, 64, 128, 96)),
}
_MLP = re.compile(r"mlp((?:_[1-9]\d*)*)")
_DECODER = re.compile(r"(.+)\+ml_decoder(?:_([1-9]\d*))?")
_WRN = re.compile(r"wrn_(\d+)_([1-9]\d*)")


def network_names() -> list[str]:
    """The names that :func:`build_network` knows, sorted.

    Besides these it takes ``mlp_A_B...`` (hidden widths), ``wrn_DEPTH_WIDTH``, ``timm/NAME`` and ``torchvision/NAME``.
    """
    return sorted([*_NETWORKS, "mlp"])


def segmentation_network_names() -> list[str]:
    """The names of networks that answer for each pixel, sorted; ``torchvision/NAME`` has more."""
    return sorted(_SEGMENTATION)


def build_network(name: str, num_classes: int, in_channels: int = 3) -> nn.Module:
    """A new network by its name, with fresh weights.

    Args:
        name: one of :func:`network_names` or :func:`segmentation_network_names`; ``mlp_A_B...`` for a fully connected
            network with these hidden widths (``mlp`` is ``mlp_128_128``); ``wrn_DEPTH_WIDTH``; ``timm/NAME`` or
            ``torchvision/NAME`` without pretrained weights.
        num_classes: number of logits.
        in_channels: channels of the images; for an mlp the number of values of one input (C * H * W for images).

    Returns:
        A module from ``[N, in_channels, H, W]`` (an mlp: ``[N, ...]``) to logits ``[N, num_classes]``; a
        segmentation network to a dict of ``out`` and ``aux``, ``[N, num_classes, H, W]``.

    Raises:
        ValueError: where the name is not known, or a number is below 1.
        ImportError: where ``timm/NAME`` is asked for and timm is not installed.
    """
    for argument, value in (("num_classes", num_classes), ("in_channels", in_channels)):
        if value < 1:
            raise ValueError(f"{argument} of network {name!r} must be at least 1, got {value}")
    if name in _NETWORKS:
        return _NETWORKS[name](num_classes, in_channels)
    if name in _SEGMENTATION:
        return _SEGMENTATION[name](num_classes, in_channels)
    if match := _MLP.fullmatch(name):
        hidden = [int(width) for width in match[1].split("_")[1:]]
        return MLP(in_channels, num_classes, hidden or (128, 128))
    if match := _WRN.fullmatch(name):
        return WideResNet(int(match[1]), int(match[2]), num_classes, in_channels)
    if name.startswith("timm/"):
        return timm_network(name, num_classes, in_channels)
    if name.startswith("torchvision/"):
        return torchvision_network(name, num_classes, in_channels)
    raise unknown_network(name, [*network_names(), *segmentation_network_names()])


def split_head(name: str) -> tuple[str, dict[str, Any] | None]:
    """``NAME`` and the sizes of the head of ``NAME+ml_decoder``, for ``with_ml_decoder``; ``None`` without a head."""
    match = _DECODER.fullmatch(name)
    if match is None:
        return name, None
    dim = int(match[2] or 768)
    return match[1], {"embedding_dim": dim, "inner_dim": dim * 8 // 3}


def network_for(name: str, num_classes: int, input_shape: Sequence[int]) -> nn.Module:
    """A new network for inputs of one shape, as data modules give it.

    Args:
        name: as in :func:`build_network`, perhaps with a head: ``NAME+ml_decoder`` answers each label by a query of its
            own (``MLDecoderNetwork``), ``NAME+ml_decoder_64`` by embeddings of 64 values and an inner width of 170.
        num_classes: number of logits.
        input_shape: ``(C, H, W)`` of the images, or ``(D,)`` of features, which only an mlp takes.

    Raises:
        ValueError: where an image network is asked for features, and as in :func:`build_network`.
        ImportError: as in :func:`build_network`.
    """
    backbone, head = split_head(name)
    if head is not None:
        return with_ml_decoder(network_for(backbone, num_classes, input_shape), num_classes, input_shape, **head)
    if _MLP.fullmatch(name):
        return build_network(name, num_classes, math.prod(input_shape))
    if len(input_shape) != 3:
        raise ValueError(
            f"network {name!r} takes images (C, H, W), but input_shape is {tuple(input_shape)}; "
            "for features use an mlp, for example mlp_128_128"
        )
    return build_network(name, num_classes, input_shape[0])
