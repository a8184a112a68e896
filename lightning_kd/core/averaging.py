"""A moving average of a network's weights.

Unlike ``torch.optim.swa_utils.AveragedModel`` it keeps no counter that a GPU must be waited for, takes any decay at
each update, is out of the optimizer and can leave buffers to the copy itself.
"""

from __future__ import annotations

import copy
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from lightning_kd.argument_checks import check_numbers

Network = TypeVar("Network", bound=nn.Module)


def averaged_copy(network: Network) -> Network:
    """A copy of ``network``, its present weights and mode included, that no optimizer trains.

    As an attribute of a task it is saved and loaded with it.
    """
    average = copy.deepcopy(network)
    average.requires_grad_(False)
    return average


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
        decay: what stays of the average, in [0, 1]; 0 copies.
        buffers: what becomes of buffers such as the running statistics of batch normalisation: ``"copy"`` takes those
            of the network, ``"average"`` treats them as parameters, ``"keep"`` leaves the average its own, as it
            gathers them where it runs in training mode itself. Counters (integer buffers) are copied by the first two.

    Raises:
        ValueError: for another ``decay`` or ``buffers``, or networks that differ in their tensors.
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
        torch._foreach_lerp_(mine, theirs, 1 - decay)
    if buffers != "keep":
        for old, new in buffer_pairs:
            old.copy_(new)


def _pairs(average: dict[str, Tensor], network: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    if {k: v.shape for k, v in average.items()} != {k: v.shape for k, v in network.items()}:
        raise ValueError("average and network differ in their tensors: make the average by averaged_copy(network)")
    return [(average[name], network[name]) for name in average]
