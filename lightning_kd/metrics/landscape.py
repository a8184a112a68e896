"""Slices of the loss around the weights of a network, and between two networks.

Li et al., Visualizing the Loss Landscape of Neural Nets, NeurIPS 2018, arXiv 1712.09913.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_kd.metrics._inputs import generator
from lightning_kd.metrics._objective import LossFn, objective


class LossSlice(NamedTuple):
    """The loss along one direction or two.

    Attributes:
        position: float64 ``[points]``, multiples of the direction, of both where there are two; 0 is the network.
        loss: float64 ``[points]``, or ``[points, points]`` by the first and the second direction.
        samples: that the loss is the mean of.
    """

    position: Tensor
    loss: Tensor
    samples: int


def filter_normalized_direction(
    model: nn.Module, generator: torch.Generator, orthogonal_to: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """A random direction in which each filter is as long as the network's own.

    Normal numbers for each parameter with at least 2 dimensions; each of its filters (first index; a row of a linear
    layer) is scaled to the norm of the network's filter. 0 for biases and the parameters of normalisation layers.

    Args:
        model: only its trainable parameters count.
        generator: on the CPU.
        orthogonal_to: another direction; each filter is made orthogonal to its filter, before the scaling.

    Returns:
        float64 tensors on the CPU by parameter name.

    Source: arXiv 1712.09913, section 4, with 1e-10 added to the norm that is divided by, as in the authors' code.
    """
    direction: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim < 2:
            direction[name] = torch.zeros(parameter.shape, dtype=torch.float64)
            continue
        weight = parameter.detach().to("cpu", torch.float64).flatten(1)
        rows = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        if orthogonal_to is not None:
            other = orthogonal_to[name].flatten(1)
            square = other.square().sum(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
            rows = rows - (rows * other).sum(1, keepdim=True) / square * other
        rows = rows * (weight.norm(dim=1, keepdim=True) / (rows.norm(dim=1, keepdim=True) + 1e-10))
        direction[name] = rows.view(parameter.shape)
    return direction


def loss_slice(
    model: nn.Module,
    loss_fn: LossFn | None,
    loader: Any,
    directions: int = 1,
    points: int = 51,
    span: float = 1.0,
    seed: int = 0,
    orthogonal: bool = False,
) -> LossSlice:
    """The loss along one or two random directions through the weights, each filter scaled to the network's own.

    The network is run on copies of its weights, in eval mode, and left as it was. ``points`` (squared for two
    directions) passes over the samples. Two networks are comparable at equal data and span; scaling by filters takes
    out what rescaling their weights would do, the loss itself still counts.

    Several processes: each gives its share of the samples, and all get the same slice.

    Args:
        model: a network.
        loss_fn: see ``lightning_kd.metrics.hessian_vector_product``, as ``loader``.
        loader: the data.
        directions: 1 or 2.
        points: along each direction; an odd number has the network itself in the middle.
        span: from ``-span`` to ``span``, in multiples of the direction.
        seed: of the directions.
        orthogonal: make the second direction orthogonal to the first, filter by filter.

    Raises:
        ValueError: where an argument is out of range, or for no sample or a loss that is not finite at the network.
    """
    if directions not in (1, 2):
        raise ValueError(f"directions must be 1 or 2, got {directions}")
    if points < 2 or not span > 0:
        raise ValueError(f"points must be at least 2 and span positive, got {points} and {span}")
    position = (torch.arange(points, dtype=torch.float64) - (points - 1) / 2) * (2 * span / (points - 1))
    first = filter_normalized_direction(model, generator(seed, "slice", 0))
    other = None
    if directions == 2:
        other = filter_normalized_direction(model, generator(seed, "slice", 1), first if orthogonal else None)
    with objective(model, loss_fn, loader) as found:
        found.value()  # what is wrong with the loss shows here
        steps = [_flat(d.values()).to(found.weights) for d in (first, other) if d is not None]
        if len(steps) == 1:
            losses = [found.value(found.weights + a * steps[0]) for a in position.tolist()]
        else:
            grid = [(a, b) for a in position.tolist() for b in position.tolist()]
            losses = [found.value(found.weights + a * steps[0] + b * steps[1]) for a, b in grid]
        return LossSlice(position, torch.tensor(losses, dtype=torch.float64).view([points] * directions), found.samples)


def interpolation(
    model: nn.Module,
    other: nn.Module,
    loss_fn: LossFn | None,
    loader: Any,
    points: int = 51,
    low: float = -0.5,
    high: float = 1.5,
) -> LossSlice:
    """The loss on the line from one network (position 0) through another of the same shape (position 1).

    All parameters and floating-point buffers, as the statistics of batch normalisation, move along the line; variances
    do not go below 0.

    Args:
        model: a network.
        other: another; both are left as they were.
        loss_fn: see ``lightning_kd.metrics.hessian_vector_product``, as ``loader``.
        loader: the data.
        points: on the line.
        low: where it begins.
        high: where it ends.

    Raises:
        ValueError: where the networks differ in the names or shapes of their parameters.
    """
    shapes = [{name: value.shape for name, value in m.state_dict().items()} for m in (model, other)]
    if shapes[0] != shapes[1]:
        differ = sorted(name for name in {*shapes[0], *shapes[1]} if shapes[0].get(name) != shapes[1].get(name))
        raise ValueError(f"other must have the parameters of model, {differ[:5]} differ: give two networks of one kind")
    names = [name for name, _ in model.named_parameters()]
    position = torch.linspace(low, high, points, dtype=torch.float64)
    with (
        objective(model, loss_fn, loader, parameters=names) as start,
        objective(other, loss_fn, loader, parameters=names) as end,
    ):
        start.value()
        losses = []
        for a in position.tolist():
            fixed = {}
            for name, value in start.fixed.items():
                moved = torch.lerp(value, end.fixed[name], a) if value.is_floating_point() else value
                fixed[name] = moved.clamp_min(0) if name.endswith("running_var") else moved
            losses.append(start.value(torch.lerp(start.weights, end.weights, a), fixed))
        return LossSlice(position, torch.tensor(losses, dtype=torch.float64), start.samples)


def _flat(parts: Iterable[Tensor]) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts])
