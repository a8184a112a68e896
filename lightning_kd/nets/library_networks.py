"""Networks of timm and torchvision by name, without pretrained weights."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

import torchvision
from torch import nn

# with their auxiliary classifiers, forward would return a tuple in training mode
_WITH_AUXILIARY = ("googlenet", "inception_v3")


def unknown_network(name: str, known: Iterable[str]) -> ValueError:
    """The error for a network name that is not in ``known``; its message suggests similar names."""
    near = get_close_matches(name, list(known), n=3)
    hint = f"did you mean {', '.join(near)}? `lightning-kd list` shows all" if near else "`lightning-kd list` shows all"
    return ValueError(f"network {name!r} is not known; {hint}")


def timm_library(name: str) -> Any:
    """The timm package, after a check that it has the network ``timm/NAME``.

    Raises:
        ImportError: where timm is not installed.
        ValueError: where timm does not have the network.
    """
    try:
        timm = importlib.import_module("timm")
    except ImportError as error:
        raise ImportError(f'network {name!r} needs timm: pip install "lightning-kd[timm]"') from error
    if not timm.is_model(name.removeprefix("timm/")):
        raise unknown_network(name, (f"timm/{known}" for known in timm.list_models()))
    return timm


def timm_network(name: str, num_classes: int, in_channels: int = 3) -> nn.Module:
    """``timm/NAME`` with random weights. Images ``[N, C, H, W]`` to logits ``[N, num_classes]``.

    Raises:
        ImportError: where timm is not installed.
        ValueError: where timm does not have the network.
    """
    timm = timm_library(name)
    return timm.create_model(name.removeprefix("timm/"), num_classes=num_classes, in_chans=in_channels)


def torchvision_name(name: str) -> str:
    """The NAME of ``torchvision/NAME``, after a check that torchvision has it for classification or segmentation.

    Raises:
        ValueError: where it does not.
    """
    models = torchvision.models
    known = [*models.list_models(module=models), *models.list_models(module=models.segmentation)]
    short = name.removeprefix("torchvision/")
    if short not in known:
        raise unknown_network(name, (f"torchvision/{other}" for other in known))
    return short


def torchvision_network(name: str, num_classes: int, in_channels: int = 3) -> nn.Module:
    """``torchvision/NAME`` with random weights. Images ``[N, 3, H, W]`` to logits ``[N, num_classes]``.

    A segmentation network returns a dict of ``out`` and, where torchvision has an auxiliary head for it, ``aux``, both
    ``[N, num_classes, H, W]``.

    Raises:
        ValueError: where torchvision has no such network, or ``in_channels`` is not 3.
    """
    short = torchvision_name(name)
    if in_channels != 3:
        raise ValueError(
            f"network {name!r} takes images of 3 channels, but in_channels is {in_channels}; "
            "use a timm/ network, which takes any number"
        )
    options: dict[str, Any] = {"aux_logits": False, "init_weights": True} if short in _WITH_AUXILIARY else {}
    if short in torchvision.models.list_models(module=torchvision.models.segmentation):
        options = {"weights_backbone": None, "aux_loss": True}
        if short.startswith("lraspp"):  # it has no auxiliary head
            options.pop("aux_loss")
    return torchvision.models.get_model(short, weights=None, num_classes=num_classes, **options)


def without_auxiliary_heads(short: str, network: nn.Module) -> nn.Module:
    """Removes the auxiliary heads of a torchvision network with published weights, in place.

    With them ``forward`` returns several outputs in training mode.

    Args:
        short: torchvision's name of the network.
        network: the network.

    Returns:
        The same network.
    """
    if short in _WITH_AUXILIARY:
        network.aux_logits = False  # type: ignore[assignment]
        for head in ("aux1", "aux2", "AuxLogits"):
            if hasattr(network, head):
                setattr(network, head, None)
    return network
