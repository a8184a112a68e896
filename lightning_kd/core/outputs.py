"""Finding the logits in what a network returns, for networks of any library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["auxiliary_logits", "class_logits", "embeddings_of", "logits_of", "pixel_logits", "resized"]


def logits_of(output: Any) -> Tensor:
    """The logits in what a network returned.

    They are the tensor itself; the first entry of a tuple or list; the entry ``logits`` or ``out`` of a dict
    (torchvision's segmentation networks, Hugging Face's ``ModelOutput``); or the attribute ``logits`` of any other
    object. Anything else that was returned, such as the logits of an auxiliary head, is ignored.

    Raises:
        TypeError: if there are none, naming what was returned.
    """
    found = output
    if isinstance(output, Mapping):
        found = next((output[key] for key in ("logits", "out") if key in output), None)
    elif isinstance(output, tuple | list):
        found = output[0] if output else None
    elif not isinstance(output, Tensor):
        found = getattr(output, "logits", None)
    if isinstance(found, Tensor):
        return found
    got = type(output).__name__ + (f" with {list(output)[:8]}" if isinstance(output, Mapping) else "")
    raise TypeError(
        f"a network must return logits as a tensor, first in a tuple or list, as 'logits' or 'out' of a dict, or as "
        f"the attribute logits, got {got}: wrap the network in a module that does"
    )


def class_logits(network: nn.Module, output: Any, classes: int, name: str = "") -> Tensor:
    """``logits_of(output)``, checked to be ``[B, classes]``.

    Args:
        network: the network that returned ``output``, for the message.
        output: see ``logits_of``.
        classes: the number of logits that each sample must have.
        name: name of the network in the message. Default: its class.

    Raises:
        TypeError: if there are no logits.
        ValueError: unless they are ``[B, classes]``.
    """
    logits = logits_of(output)
    if logits.ndim != 2 or logits.shape[1] != classes:
        raise ValueError(
            f"{name or type(network).__name__} gives {list(logits.shape)}, expected [B, {classes}]: give a network "
            "with that many logits, or name its last layer by classifier where the method has that argument"
        )
    return logits


def pixel_logits(
    network: nn.Module,
    logits: Tensor,
    classes: int,
    size: Sequence[int],
    name: str = "",
    align_corners: bool = False,
) -> Tensor:
    """``logits``, checked to be ``[B, classes, h, w]`` and resized to ``size``.

    Args:
        network: the network that gave them, for the message.
        logits: its logits.
        classes: the number of channels that they must have.
        size: height and width.
        name: name of the network in the message. Default: its class.
        align_corners: see ``resized``.

    Returns:
        ``[B, classes, *size]``.

    Raises:
        ValueError: for a wrong shape.
    """
    if logits.ndim != 4 or logits.shape[1] != classes:
        raise ValueError(
            f"{name or type(network).__name__} gives {list(logits.shape)}, expected [B, {classes}, h, w]: give a "
            "segmentation network with that many classes, such as fcn_tiny or torchvision/deeplabv3_resnet50"
        )
    return resized(logits, size, align_corners)


def resized(logits: Tensor, size: Sequence[int], align_corners: bool = False) -> Tensor:
    """``[B, C, h, w]`` resized to ``size`` by bilinear interpolation; unchanged if it has that size.

    Args:
        logits: logits, or another map.
        size: height and width.
        align_corners: keep the centres of the corner pixels in place; False: the edges. See ``F.interpolate``.
    """
    if logits.shape[-2:] == tuple(size):
        return logits
    return F.interpolate(logits, tuple(size), mode="bilinear", align_corners=align_corners)


def auxiliary_logits(output: Any) -> Tensor | None:
    """The logits of the auxiliary head of a segmentation network, or ``None``.

    They are the entry ``aux`` of a dict, or the second entry of a tuple or list if that is ``[B, C, h, w]`` with as
    many channels as the first; with another number of channels it is taken for a feature map.
    """
    if isinstance(output, tuple | list) and len(output) > 1:
        first, second = output[:2]
        if all(isinstance(one, Tensor) and one.ndim == 4 for one in (first, second)):
            return second if first.shape[1] == second.shape[1] else None
        return None
    found = output.get("aux") if isinstance(output, Mapping) else None
    return found if isinstance(found, Tensor) else None


def embeddings_of(output: Any) -> Tensor | None:
    """The embeddings ``[B, C, L]`` of the labels, as an ``MLDecoder`` head gives them, or ``None``.

    They are the entry or attribute ``embeddings``, or the second entry of a tuple or list.
    """
    found = output.get("embeddings") if isinstance(output, Mapping) else getattr(output, "embeddings", None)
    if found is None and isinstance(output, tuple | list) and len(output) > 1:
        found = output[1]
    return found if isinstance(found, Tensor) and found.ndim == 3 else None
