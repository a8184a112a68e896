"""What networks of any library return, read as logits."""

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
    object. What else a network returned, such as the logits of an auxiliary head, is left alone.

    Raises:
        TypeError: where there are none, naming what was returned.
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
    """``logits_of(output)``, after a look at their shape.

    Args:
        network: what returned ``output``, for the message.
        output: see ``logits_of``.
        classes: the number of logits that each sample must have.
        name: what the message calls the network. Default: its class.

    Raises:
        TypeError: where there are no logits.
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
    """``logits`` ``[B, classes, h, w]`` brought to ``size``, after a look at their shape.

    Args:
        network: see ``class_logits``, as ``classes`` and ``name``.
        logits: what it gives.
        classes: how many channels they must have.
        size: height and width.
        name: what the message calls the network.
        align_corners: see ``resized``.

    Raises:
        ValueError: for another shape.
    """
    if logits.ndim != 4 or logits.shape[1] != classes:
        raise ValueError(
            f"{name or type(network).__name__} gives {list(logits.shape)}, expected [B, {classes}, h, w]: give a "
            "segmentation network with that many classes, such as fcn_tiny or torchvision/deeplabv3_resnet50"
        )
    return resized(logits, size, align_corners)


def resized(logits: Tensor, size: Sequence[int], align_corners: bool = False) -> Tensor:
    """``[B, C, h, w]`` brought to ``size``, height and width (bilinear); as it is where it has that.

    Args:
        logits: or what else there is for each place.
        size: height and width.
        align_corners: whether the centres of the pixels in the corners stay where they are, or the edges.
    """
    if logits.shape[-2:] == tuple(size):
        return logits
    return F.interpolate(logits, tuple(size), mode="bilinear", align_corners=align_corners)


def auxiliary_logits(output: Any) -> Tensor | None:
    """The logits of the auxiliary head of a segmentation network; ``None`` where there is none.

    They are the entry ``aux`` of a dict, or the second of a tuple or list where that is ``[B, C, h, w]`` with as many
    channels as the first has: with others it is a feature.
    """
    if isinstance(output, tuple | list) and len(output) > 1:
        first, second = output[:2]
        if all(isinstance(one, Tensor) and one.ndim == 4 for one in (first, second)):
            return second if first.shape[1] == second.shape[1] else None
        return None
    found = output.get("aux") if isinstance(output, Mapping) else None
    return found if isinstance(found, Tensor) else None


def embeddings_of(output: Any) -> Tensor | None:
    """The embeddings ``[B, C, L]`` of each label, as an ``MLDecoder`` head gives them; ``None`` without.

    They are the entry or attribute ``embeddings``, or the second of a tuple or list.
    """
    found = output.get("embeddings") if isinstance(output, Mapping) else getattr(output, "embeddings", None)
    if found is None and isinstance(output, tuple | list) and len(output) > 1:
        found = output[1]
    return found if isinstance(found, Tensor) and found.ndim == 3 else None
