"""Networks of timm and torchvision by name, without pretrained weights."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

import torchvision
from torch import nn

# Their auxiliary classifiers would make forward return a tuple in training.
_WITH_AUXILIARY = ("googlenet", "inception_v3")


def unknown_network(name: str, known: Iterable[str]) -> ValueError:
    """The error for a name that is not among ``known``, with near matches."""
    near = get_close_matches(name, list(known), n=3)
    hint = f"did you mean {', '.join(near)}? `lightning-kd list` shows all" if near else "`lightning-kd list` shows all"
    return ValueError(f"network {name!r} is not known; {hint}")


def timm_library(name: str) -> Any:
    """The timm package, once it is sure that it knows ``timm/NAME``.

    Raises:
        ImportError: where timm is not installed.
        ValueError: where timm does not know the name.
    """
    try:
        timm = importlib.import_module("timm")
    except ImportError as error:
        raise ImportError(f'network {name!r} needs timm: pip install "lightning-kd[timm]"') from error
    if not timm.is_model(name.removeprefix("timm/")):
        raise unknown_network(name, (f"timm/{known}" for known in timm.list_models()))
    return timm


def timm_network(name: str, num_classes: int, in_channels: int = 3) -> nn.Module:
    """``timm/NAME`` with new weights. Images ``[N, C, H, W]`` to logits ``[N, num_classes]``.

    Raises:
        ImportError: where timm is not installed.
        ValueError: where timm does not know the name.
    """
    timm = timm_library(name)
    return timm.create_model(name.removeprefix("timm/"), num_classes=num_classes, in_chans=in_channels)


def torchvision_name(name: str) -> str:
    """The NAME of ``torchvision/NAME``, once it is sure that torchvision has such a network for images or pixels.

    Raises:
        ValueError: where it has none.
    """
    models = torchvision.models
    known = [*models.list_models(module=models), *models.list_models(module=models.segmentation)]
    short = name.removeprefix("torchvision/")
    if short not in known:
        raise unknown_network(name, (f"torchvision/{other}" for other in known))
    return short


def torchvision_network(name: str, num_classes: int, in_channels: int = 3) -> nn.Module:
    """``torchvision/NAME`` with new weights. Images ``[N, 3, H, W]`` to logits ``[N, num_classes]``.

    A segmentation network gives a dict of ``out`` and, where torchvision has an auxiliary head for it, ``aux``, both
    ``[N, num_classes, H, W]``.

    Raises:
        ValueError: where torchvision has no such network, or ``in_channels`` is not 3.
    """
    short = torchvision_name(name)
    if in_channels != 3:
        raise ValueError(
            f"network {name!r} takes images of 3 channels, but in_channels is {in_channels}; "
            "a timm/ network takes any number"
        )
    options: dict[str, Any] = {"aux_logits": False, "init_weights": True} if short in _WITH_AUXILIARY else {}
    if short in torchvision.models.list_models(module=torchvision.models.segmentation):
        options = {"weights_backbone": None, "aux_loss": True}
        if short.startswith("lraspp"):  # has none
            options.pop("aux_loss")
    return torchvision.models.get_model(short, weights=None, num_classes=num_classes, **options)


def without_auxiliary_heads(short: str, network: nn.Module) -> nn.Module:
    """A torchvision network with published weights, without the heads that make ``forward`` return several outputs."""
    if short in _WITH_AUXILIARY:
        network.aux_logits = False  # type: ignore[assignment]
        for head in ("aux1", "aux2", "AuxLogits"):
            if hasattr(network, head):
                setattr(network, head, None)
    return network
