"""Networks by name: the CIFAR networks of the papers, small networks, ``timm/NAME`` and ``torchvision/NAME``.

Every network takes a batch and returns plain logits ``[N, num_classes]``. The input of its last ``nn.Linear`` is the
pooled feature. Its stages are submodules (``layer1``, ``block1``, ``blocks.0`` ...), so that forward hooks can read
them. Where the submodule names do not tell which outputs distillation benchmarks compare, the class attribute
``feature_stages`` lists them, the stem first. No operation is in place: a tensor that a hook keeps is not overwritten.
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

# called with num_classes and in_channels
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
# these return a dict of ``out`` and ``aux``, logits for each class and pixel
_SEGMENTATION: dict[str, Callable[[int, int], nn.Module]] = {
    "fcn_tiny": partial(FCN, (16, 32, 64, 48)),
    "fcn_small": partial(FCN, (32, 64, 128, 96)),
}
_MLP = re.compile(r"mlp((?:_[1-9]\d*)*)")
_DECODER = re.compile(r"(.+)\+ml_decoder(?:_([1-9]\d*))?")
_WRN = re.compile(r"wrn_(\d+)_([1-9]\d*)")


def network_names() -> list[str]:
    """The fixed names of classification networks that :func:`build_network` accepts, sorted.

    It also accepts ``mlp_A_B...`` (hidden widths), ``wrn_DEPTH_WIDTH``, ``timm/NAME`` and ``torchvision/NAME``.
    """
    return sorted([*_NETWORKS, "mlp"])


def segmentation_network_names() -> list[str]:
    """The fixed names of segmentation networks, sorted; there are more under ``torchvision/NAME``."""
    return sorted(_SEGMENTATION)


def build_network(name: str, num_classes: int, in_channels: int = 3) -> nn.Module:
    """A new network by its name, with random weights.

    Args:
        name: one of :func:`network_names` or :func:`segmentation_network_names`; ``mlp_A_B...`` for a fully connected
            network with these hidden widths (``mlp`` is ``mlp_128_128``); ``wrn_DEPTH_WIDTH``; ``timm/NAME`` or
            ``torchvision/NAME`` without pretrained weights.
        num_classes: number of logits.
        in_channels: channels of the images; for an mlp the number of values of one input (C * H * W for images).

    Returns:
        A module that maps float images ``[N, in_channels, H, W]`` (an mlp: ``[N, ...]``) to logits
        ``[N, num_classes]``. A segmentation network returns a dict of ``out`` and ``aux``, logits
        ``[N, num_classes, H, W]``.

    Raises:
        ValueError: for an unknown name, or a number below 1.
        ImportError: for ``timm/NAME`` where timm is not installed.
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
    """Splits ``NAME+ml_decoder`` into the backbone's name and the keyword arguments of ``with_ml_decoder``.

    Args:
        name: ``NAME``, ``NAME+ml_decoder`` or ``NAME+ml_decoder_DIM``, with the embedding size ``DIM`` (default: 768).

    Returns:
        ``NAME``, and ``embedding_dim`` and ``inner_dim`` (``8 / 3`` of it); ``None`` for a name without a head.
    """
    match = _DECODER.fullmatch(name)
    if match is None:
        return name, None
    dim = int(match[2] or 768)
    return match[1], {"embedding_dim": dim, "inner_dim": dim * 8 // 3}


def network_for(name: str, num_classes: int, input_shape: Sequence[int]) -> nn.Module:
    """A new network by its name, for the ``input_shape`` of a data module.

    Args:
        name: as in :func:`build_network`; or with another head: ``NAME+ml_decoder`` has one attention query per label
            (``MLDecoderNetwork``), ``NAME+ml_decoder_64`` the same with embeddings of 64 values and an inner width of
            170.
        num_classes: number of logits.
        input_shape: ``(C, H, W)`` of images, or ``(D,)`` of feature vectors, which only an mlp accepts.

    Returns:
        As in :func:`build_network`; with the ``ml_decoder`` head a ``LabelOutput`` of logits and embeddings.

    Raises:
        ValueError: for an image network and an ``input_shape`` that is not ``(C, H, W)``, and as in
            :func:`build_network`.
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
