"""Slices of the loss landscape."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_kd.callbacks import slice_figure
from lightning_kd.metrics import LossSlice, filter_normalize, filter_normalized_direction, interpolation, loss_slice
from lightning_kd.metrics._arguments import generator as stream
from tests.metrics.test_curvature import mlp, sample_batches, samples


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 2, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(),
        nn.Linear(27, 3), nn.Linear(3, 3).requires_grad_(False),
    ).double()  # fmt: skip


def test_directions_have_the_lengths_of_the_filters() -> None:
    model = network()
    model[1].weight.data[1] = 0
    first = filter_normalized_direction(model, torch.Generator().manual_seed(0))
    second = filter_normalized_direction(model, torch.Generator().manual_seed(1), first)
    assert list(first) == ["1.weight", "1.bias", "2.weight", "2.bias", "5.weight", "5.bias"]
    for direction in (first, second):
        for name in ("1.weight", "5.weight"):
            expected = dict(model.named_parameters())[name].detach().flatten(1).norm(dim=1)
            torch.testing.assert_close(direction[name].flatten(1).norm(dim=1), expected, rtol=1e-8, atol=0)
        assert not any(direction[name].any() for name in ("1.bias", "2.weight", "2.bias", "5.bias"))
    dots = (first["5.weight"] * second["5.weight"]).sum(1)
    assert dots.abs().max() < 1e-12
    assert not torch.equal(first["5.weight"], filter_normalized_direction(model, torch.Generator())["5.weight"])


def test_slice_is_the_loss_at_moved_weights() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    image, target = samples()
    one = loss_slice(model, None, sample_batches([5, 7]), points=5, span=0.5, seed=3)
    two = loss_slice(model, None, samples(), directions=2, points=3, seed=3)
    assert one.position.tolist() == [-0.5, -0.25, 0, 0.25, 0.5]
    assert (one.loss.shape, two.loss.shape, one.samples) == ((5,), (3, 3), 12)
    here = F.cross_entropy(copy.deepcopy(model).eval()(image), target).item()
    assert one.loss[2].item() == pytest.approx(here, rel=1e-12)
    assert two.loss[1, 1].item() == pytest.approx(here, rel=1e-14)
    torch.testing.assert_close(two.loss[:, 1], loss_slice(model, None, samples(), points=3, seed=3).loss)
    assert not torch.equal(two.loss[:, 1], two.loss[1])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training
    for options, message in (({"directions": 3}, "directions must be 1 or 2"), ({"points": 1}, "points must be")):
        with pytest.raises(ValueError, match=message):
            loss_slice(model, None, samples(), **options)


def test_slices_along_given_directions_and_of_chosen_parameters() -> None:
    model = network()
    given = {"5.weight": torch.randn(3, 27), "5.bias": torch.ones(3)}
    scaled = filter_normalize(model, given)
    norms = model[5].weight.detach().norm(dim=1)
    torch.testing.assert_close(scaled["5.weight"].norm(dim=1), norms, rtol=1e-8, atol=0)
    torch.testing.assert_close(F.cosine_similarity(scaled["5.weight"], given["5.weight"]), torch.ones(3).double())
    assert not scaled["5.bias"].any()
    found = loss_slice(model, None, samples(), points=3, along=[given])
    moved = copy.deepcopy(model).eval()
    with torch.no_grad():
        moved[5].weight -= given["5.weight"]
        moved[5].bias -= 1
    image, target = samples()
    assert found.loss[0].item() == pytest.approx(F.cross_entropy(moved(image), target).item(), rel=1e-9)
    both = loss_slice(model, None, samples(), points=3, along=[{"1.bias": torch.ones(3)}, given])
    torch.testing.assert_close(both.loss[1], found.loss)
    # the last layer is frozen: nothing of it moves unless it is named
    assert list(filter_normalized_direction(model, torch.Generator(), parameters=["6"])) == ["6.weight", "6.bias"]
    first = filter_normalized_direction(model, torch.Generator(), parameters=["6"])
    assert first["6.weight"].any()
    frozen = loss_slice(model.requires_grad_(False), None, samples(), points=3, parameters=["6.weight"])
    assert frozen.loss[0] != frozen.loss[1]
    for wrong in ({"7.weight": torch.ones(3)}, {"5.weight": torch.ones(27, 3)}):
        with pytest.raises(ValueError, match="a direction must have the names and shapes"):
            filter_normalize(model, wrong)
        with pytest.raises(ValueError, match="a direction must have the names and shapes"):
            loss_slice(model, None, samples(), along=[wrong])


def test_orthogonal_slice_of_chosen_parameters_moves_them_along_orthogonal_directions() -> None:
    model = network()
    options = {"points": 3, "seed": 3, "parameters": ["6"]}
    found = loss_slice(model, None, samples(), 2, orthogonal=True, **options)
    torch.testing.assert_close(found.loss[:, 1], loss_slice(model, None, samples(), **options).loss)
    first = filter_normalized_direction(model, stream(3, "slice", 0), None, ["6"])
    second = filter_normalized_direction(model, stream(3, "slice", 1), first, ["6"])
    assert (first["6.weight"] * second["6.weight"]).sum(1).abs().max() < 1e-12
    expected = loss_slice(model, None, samples(), points=3, along=[first, second])
    torch.testing.assert_close(found.loss, expected.loss)
    plain = loss_slice(model, None, samples(), 2, **options)
    torch.testing.assert_close(plain.loss[:, 1], found.loss[:, 1])
    assert (plain.loss - found.loss).abs().max() > 1e-3


def test_interpolation_passes_through_both_networks() -> None:
    model, other = network(), network()
    with torch.no_grad():
        for value in other.state_dict().values():
            value.copy_(value + 1)
    line = interpolation(model, other, None, samples(), points=5)
    image, target = samples()
    ends = [F.cross_entropy(copy.deepcopy(m).eval()(image), target).item() for m in (model, other)]
    assert line.position.tolist() == [-0.5, 0, 0.5, 1, 1.5]
    assert line.loss[[1, 3]].tolist() == pytest.approx(ends, rel=1e-12)
    with pytest.raises(ValueError, match="must have the parameters of model"):
        interpolation(model, mlp(), None, samples())


def test_slice_figure_draws_lines_and_contours() -> None:
    position = torch.linspace(-1, 1, 3, dtype=torch.float64)
    bowl = LossSlice(position, position.square() + 0.01, 5)
    wide = LossSlice(position, torch.tensor([math.nan, 1, 2]).double(), 5)
    figure = slice_figure({"SGD": bowl, "shifted": wide})
    (axes,) = figure.axes
    assert [line.get_label() for line in axes.get_lines()] == ["SGD", "shifted"]
    assert axes.get_yscale() == "log"
    np.testing.assert_array_equal(axes.get_lines()[0].get_ydata(), bowl.loss.numpy())
    grid = LossSlice(position, position[:, None].square() + 2 * position.square() + 1, 5)
    contours = slice_figure(grid)
    assert len(contours.axes) == 2
    slice_figure(LossSlice(position, torch.ones(3, 3).double(), 5)).canvas.draw()
    contours.canvas.draw()
    with pytest.raises(ValueError, match="one slice, or several along one direction"):
        slice_figure({"a": grid, "b": bowl})
