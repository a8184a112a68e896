"""A moving average of a network's weights.

Unlike ``torch.optim.swa_utils.AveragedModel`` it has no counter on the device, takes another decay at each update if
needed, has no parameters with gradient, and can leave buffers to the copy itself.
"""

from __future__ import annotations

import copy
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from lightning_kd.argument_checks import check_numbers

Network = TypeVar("Network", bound=nn.Module)


def averaged_copy(network: Network) -> Network:
    """A copy of ``network`` with its present weights and mode, whose parameters need no gradient.

    As an attribute of a task it is part of its checkpoints. The steps of an average are too small for half precision:
    a task names it in ``keep_precise``, so that it stays float32, and the average converts its inputs to its own dtype.
    """
    average = copy.deepcopy(network)
    average.requires_grad_(False)
    for part in average.children() if isinstance(average, nn.ModuleDict | nn.ModuleList) else [average]:
        part.register_forward_pre_hook(_in_own_precision)
    return average


def _in_own_precision(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    own = next((p.dtype for p in module.parameters() if p.is_floating_point()), None)
    return tuple(x.to(own) if isinstance(x, Tensor) and x.is_floating_point() and own else x for x in inputs)


@torch.no_grad()
def update_average(
    average: nn.Module,
    network: nn.Module,
    decay: float,
    buffers: Literal["copy", "average", "keep"] = "copy",
) -> None:
    """Move ``average`` towards ``network``, in place: ``decay * average + (1 - decay) * network``.

    Args:
        average: from ``averaged_copy``.
        network: the trained network.
        decay: weight of the old average, in [0, 1]; 0 copies the network.
        buffers: how to treat buffers such as the running statistics of batch normalisation: ``"copy"`` copies those of
            the network, ``"average"`` averages them like parameters, ``"keep"`` does not change them, for an average
            that runs in training mode itself. Integer buffers (counters) are copied by the first two.

    Raises:
        ValueError: for a ``decay`` out of range, an unknown ``buffers``, or networks with different tensors.
    """
    check_numbers(least=0, most=1, decay=decay)
    if buffers not in ("copy", "average", "keep"):
        raise ValueError(f"buffers must be 'copy', 'average' or 'keep', got {buffers!r}")
    pairs = _pairs(dict(average.named_parameters()), dict(network.named_parameters()))
    buffer_pairs = _pairs(dict(average.named_buffers()), dict(network.named_buffers()))
    if buffers == "average":
        pairs += [pair for pair in buffer_pairs if pair[0].is_floating_point()]
        buffer_pairs = [pair for pair in buffer_pairs if not pair[0].is_floating_point()]
    if pairs:
        mine, theirs = (list(tensors) for tensors in zip(*pairs, strict=True))
        theirs = [new.to(old.dtype) for old, new in zip(mine, theirs, strict=True)]
        torch._foreach_lerp_(mine, theirs, 1 - decay)
    if buffers != "keep":
        for old, new in buffer_pairs:
            old.copy_(new)


def _pairs(average: dict[str, Tensor], network: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    if {k: v.shape for k, v in average.items()} != {k: v.shape for k, v in network.items()}:
        raise ValueError("average and network differ in their tensors: make the average by averaged_copy(network)")
    return [(average[name], network[name]) for name in average]
