"""The loss along directions through the weights of a network, and on the line between two networks.

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
        position: float64 ``[points]``, steps in multiples of each direction; 0 is the network itself.
        loss: float64 ``[points]``, or ``[points, points]`` (first direction, second direction).
        samples: number of samples that the loss is averaged over.
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
    """A random direction in which each filter has the norm of the network's own filter.

    Normal numbers for each parameter with at least 2 dimensions; each filter (the slice at one first index; a row of a
    linear layer) is scaled to the norm of the network's filter. Biases and parameters of normalisation layers get 0.

    Args:
        model: a network.
        generator: a generator on the CPU.
        orthogonal_to: another direction; each filter is made orthogonal to the filter there, before the scaling.
        parameters: names of parameters, or of modules for all of theirs. Default: all trainable ones.

    Returns:
        float64 tensors on the CPU by parameter name.

    Raises:
        ValueError: for an unknown name in ``parameters``.

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
    """A direction with each filter scaled to the norm of the network's own filter.

    A filter is the slice of a parameter at one first index, such as a row of a linear layer. Parameters with fewer than
    2 dimensions, such as biases and those of normalisation layers, become 0.

    Args:
        model: a network.
        direction: tensors shaped like its parameters, by parameter name; some may be left out.

    Returns:
        float64 tensors on the CPU by the same names.

    Raises:
        ValueError: for a name that the network does not have, or another shape.

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
    """The loss along one or two directions through the weights, by default random ones with normalised filters.

    The network runs in eval mode on copies of its weights and stays unchanged. It takes ``points`` passes over the
    samples (``points`` squared for two directions). Compare two networks at equal data, span and loss: normalised
    filters remove only the effect of rescaled weights.

    With several processes, each passes its share of the samples, and all get the same slice.

    Args:
        model: a network.
        loss_fn: as in ``lightning_kd.metrics.hessian_vector_product``.
        loader: as in ``lightning_kd.metrics.hessian_vector_product``.
        directions: 1 or 2.
        points: number of points along each direction; with an odd number the middle one is the network itself.
        span: points go from ``-span`` to ``span``, in multiples of the direction.
        seed: of the random directions.
        orthogonal: make the second random direction orthogonal to the first, filter by filter.
        parameters: names of the parameters to vary, as in ``filter_normalized_direction``.
        along: one or two directions to use unscaled instead of random ones: tensors shaped like the parameters, by
            parameter name; parameters without an entry stay fixed. With it two networks can be compared along the same
            directions, as they are or scaled to each network by ``filter_normalize``.

    Returns:
        The positions and the loss at each.

    Raises:
        ValueError: where an argument is out of range, there is no sample, or the loss at the network is not finite.
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
        found.value()  # raises for a wrong loss_fn or loader before the many passes below
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
    """The loss on the line through the weights of two networks, ``model`` at position 0 and ``other`` at position 1.

    All parameters and floating-point buffers, such as batch-normalisation statistics, are interpolated linearly;
    running variances are clamped at 0.

    Args:
        model: a network; it stays unchanged.
        other: a network with parameters of the same names and shapes; it stays unchanged.
        loss_fn: as in ``lightning_kd.metrics.hessian_vector_product``.
        loader: as in ``lightning_kd.metrics.hessian_vector_product``.
        points: number of points on the line.
        low: position of the first point.
        high: position of the last point.

    Returns:
        The positions and the loss at each.

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
    """The parameters of ``model`` by name; ValueError where ``direction`` has another name or shape."""
    known = dict(model.named_parameters())
    if unfit := [name for name, part in direction.items() if name not in known or known[name].shape != part.shape]:
        raise ValueError(
            f"a direction must have the names and shapes of the parameters of {type(model).__name__}, {unfit[:5]} do "
            f"not fit: choose from {list(known)[:12]}"
        )
    return known
