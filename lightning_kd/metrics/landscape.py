"""Slices of the loss around the weights of a network, and between two networks.

Li et al., Visualizing the Loss Landscape of Neural Nets, NeurIPS 2018, arXiv 1712.09913.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_kd.metrics._arguments import chosen_parameters
from lightning_kd.metrics._arguments import generator as stream
from lightning_kd.metrics._batch_derivatives import LossFn
from lightning_kd.metrics._objective import objective


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
    model: nn.Module,
    generator: torch.Generator,
    orthogonal_to: dict[str, Tensor] | None = None,
    parameters: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """A random direction in which each filter is as long as the network's own.

    Normal numbers for each parameter with at least 2 dimensions; each of its filters (first index; a row of a linear
    layer) is scaled to the norm of the network's filter. 0 for biases and the parameters of normalisation layers.

    Args:
        model: a network.
        generator: on the CPU.
        orthogonal_to: another direction; each filter is made orthogonal to its filter, before the scaling.
        parameters: names of parameters, or of modules for all of theirs. Default: all trainable ones.

    Returns:
        float64 tensors on the CPU by parameter name.

    Source: arXiv 1712.09913, section 4, with 1e-10 added to the norm that is divided by, as in the authors' code.
    """
    direction: dict[str, Tensor] = {}
    for name, parameter in chosen_parameters(model, parameters).items():
        if parameter.ndim < 2:
            direction[name] = torch.zeros(parameter.shape, dtype=torch.float64)
            continue
        rows = torch.randn(parameter.flatten(1).shape, generator=generator, dtype=torch.float64)
        if orthogonal_to is not None:
            other = orthogonal_to[name].flatten(1)
            square = other.square().sum(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
            rows = rows - (rows * other).sum(1, keepdim=True) / square * other
        direction[name] = rows.view(parameter.shape)
    return filter_normalize(model, direction)


def filter_normalize(model: nn.Module, direction: dict[str, Tensor]) -> dict[str, Tensor]:
    """A direction with each filter scaled to the norm of the network's own.

    Filters are the parts of a parameter along its first index, the rows of a linear layer among them. Parameters with
    fewer than 2 dimensions, as biases and those of normalisation layers, become 0.

    Args:
        model: a network.
        direction: tensors shaped like its parameters, by their names; it may leave out some.

    Returns:
        float64 tensors on the CPU by the same names.

    Raises:
        ValueError: for a name or a shape that the network has not.

    Source: arXiv 1712.09913, section 4, with 1e-10 added to the norm that is divided by, as in the authors' code.
    """
    known = _fitting(model, direction)
    scaled: dict[str, Tensor] = {}
    for name, part in direction.items():
        rows = part.detach().to("cpu", torch.float64)
        if rows.ndim < 2:
            scaled[name] = torch.zeros_like(rows)
            continue
        rows, weight = rows.flatten(1), known[name].detach().to("cpu", torch.float64).flatten(1)
        rows = rows * (weight.norm(dim=1, keepdim=True) / (rows.norm(dim=1, keepdim=True) + 1e-10))
        scaled[name] = rows.view(part.shape)
    return scaled


def loss_slice(
    model: nn.Module,
    loss_fn: LossFn | None,
    loader: Any,
    directions: int = 1,
    points: int = 51,
    span: float = 1.0,
    seed: int = 0,
    orthogonal: bool = False,
    *,
    parameters: Sequence[str] | None = None,
    along: Sequence[dict[str, Tensor]] | None = None,
) -> LossSlice:
    """The loss along one or two directions through the weights: random ones, each filter scaled to the network's own.

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
        parameters: that the random directions are in, see ``filter_normalized_direction``.
        along: one or two directions instead of the random ones, as they are: tensors shaped like the parameters, by
            their names; what is not named stays. To compare two networks along the same directions, scaled to each or
            not (``filter_normalize``).

    Raises:
        ValueError: where an argument is out of range, or for no sample or a loss that is not finite at the network.
    """
    directions = directions if along is None else len(along)
    if directions not in (1, 2):
        raise ValueError(f"directions must be 1 or 2, got {directions}")
    if points < 2 or not span > 0:
        raise ValueError(f"points must be at least 2 and span positive, got {points} and {span}")
    position = (torch.arange(points, dtype=torch.float64) - (points - 1) / 2) * (2 * span / (points - 1))
    if along is None:
        along = [filter_normalized_direction(model, stream(seed, "slice", 0), None, parameters)]
        if directions == 2:
            first = along[0] if orthogonal else None
            along = [*along, filter_normalized_direction(model, stream(seed, "slice", 1), first, parameters)]
    for direction in along:
        _fitting(model, direction)
    names = list(dict.fromkeys(name for direction in along for name in direction))
    with objective(model, loss_fn, loader, parameters=names) as found:
        found.value()  # what is wrong with the loss shows here
        zero = {name: torch.zeros_like(leaf) for name, leaf in zip(found.names, found.leaves, strict=True)}
        steps = [torch.cat([d.get(name, zero[name]).to(found.weights).reshape(-1) for name in zero]) for d in along]
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


def _fitting(model: nn.Module, direction: dict[str, Tensor]) -> dict[str, nn.Parameter]:
    """The parameters of ``model``, if those that ``direction`` names are shaped like its tensors."""
    known = dict(model.named_parameters())
    if unfit := [name for name, part in direction.items() if name not in known or known[name].shape != part.shape]:
        raise ValueError(
            f"a direction must have the shapes of the parameters of {type(model).__name__}, {unfit[:5]} differ or are "
            f"no parameters: name some of {list(known)[:12]}"
        )
    return known
