"""Epsilon sharpness, the rise of the loss around a minimum, and the report of all measures."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_kd.metrics import (
    epsilon_sharpness,
    hessian_eigenvalues,
    hessian_trace,
    measure_sharpness,
    neural_collapse,
    relative_flatness,
)
from tests.metrics.test_curvature import Quadratic, VariedLayers, loss_from_model, mlp, sample_batches, samples


def test_epsilon_sharpness_of_a_quadratic_equals_worked_numbers() -> None:
    # L = (1 + 10) / 2 at (1, 1); the step is 0.1 (1, 10) / |(1, 10)|
    model = Quadratic(torch.diag(torch.tensor([1.0, 10.0]).double()))
    model.w.data.fill_(1)
    found = epsilon_sharpness(model, loss_from_model, samples(1), rho=0.1)
    assert found.loss == 5.5
    expected = ((1 + 0.1 / 101**0.5) ** 2 + 10 * (1 + 1 / 101**0.5) ** 2) / 2
    assert found.perturbed_loss == pytest.approx(expected, rel=1e-12)
    assert found.value == pytest.approx(expected - 5.5, rel=1e-7)


def linear(model: nn.Module, batch: Any) -> Tensor:
    return 3 * model.weight.sum() + 4 * model.bias.sum()


def test_adaptive_epsilon_sharpness_scales_weights_but_not_biases() -> None:
    model = nn.Linear(1, 1).double()
    model.weight.data.fill_(2)
    model.bias.data.fill_(5)
    # L = 3 w + 4 b: T = (2.01, 1), e = 0.5 T^2 g / |T g|
    batch = (torch.ones(1, 1), torch.ones(1))
    found = epsilon_sharpness(model, linear, batch, rho=0.5, adaptive=True)
    assert found.value == pytest.approx(0.5 * ((2.01 * 3) ** 2 + 4**2) ** 0.5, rel=1e-12)


def test_adaptive_epsilon_sharpness_is_unchanged_by_rescaling() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 3, bias=False)).double()
    rises = []
    for _ in range(2):
        kinds = {"adaptive": {"adaptive": True, "eta": 0.0}, "plain": {}}
        rises.append({kind: epsilon_sharpness(model, None, samples(), **o).value for kind, o in kinds.items()})
        model[0].weight.data *= 4
        model[2].weight.data /= 4
    assert rises[1]["adaptive"] == pytest.approx(rises[0]["adaptive"], rel=1e-9)
    assert rises[1]["plain"] != pytest.approx(rises[0]["plain"], rel=0.1)


def test_report_equals_the_single_functions() -> None:
    model, (image, target) = mlp(), samples()
    found = measure_sharpness(
        model, None, sample_batches([5, 5, 2]), classifier=model[4], rhos=(0.05,), max_probes=30, seed=4
    )
    eigenvalues = hessian_eigenvalues(model, None, samples(), seed=4)
    trace = hessian_trace(model, None, samples(), max_probes=30, seed=4)
    feature = model[:4](image).detach()
    logits = model[4](feature).detach()
    assert found.loss == pytest.approx(F.cross_entropy(logits, target).item(), rel=1e-12)
    assert found.accuracy == pytest.approx((logits.argmax(1) == target).double().mean().item())
    assert (found.samples, found.hvps, found.dtype) == (12, 60, "float64")
    assert found.top_eigenvalue == pytest.approx(eigenvalues.values[0], rel=1e-9)
    assert found.smallest_eigenvalue == pytest.approx(eigenvalues.smallest, rel=1e-9)
    assert (found.trace, found.trace_error) == pytest.approx((trace.value, trace.standard_error), rel=1e-9)
    assert sum(found.layer_traces.values()) == pytest.approx(found.trace, rel=1e-9)
    assert found.epsilon_sharpness == {0.05: pytest.approx(epsilon_sharpness(model, None, samples()).value, rel=1e-9)}
    assert found.kappa == pytest.approx(relative_flatness(feature, model[4].weight, logits), rel=1e-12)
    assert found.nc1 == pytest.approx(neural_collapse(feature, target, 3), rel=1e-12)
    norm = torch.cat([p.detach().flatten() for p in model.parameters()]).norm()
    assert found.weight_norm == pytest.approx(norm.item(), rel=1e-12)
    lines = str(found).splitlines()
    assert lines[0].startswith("loss ")
    assert "12 samples, accuracy" in lines[0]
    assert [line.split("  ")[0] for line in lines[1:4]] == ["top eigenvalue", "smallest eigenvalue", "trace"]
    end = len("smallest eigenvalue") + 2 + 11  # the values end in one column
    assert all(line[end - 1] != " " and line[end : end + 2] in ("", "  ") for line in lines[:-1])
    assert float(lines[1][end - 11 : end]) == pytest.approx(found.top_eigenvalue, rel=1e-4)
    assert "kappa does not" in lines[-1]
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert plain["epsilon_sharpness"] == {"0.05": found.epsilon_sharpness[0.05]}
    assert plain["layer_traces"].keys() == {"0", "2", "4"}


def test_report_measures_only_what_is_asked_for() -> None:
    model = mlp()
    found = measure_sharpness(model, lambda m, b: F.cross_entropy(m(b[0]), b[1]), samples(), which=["epsilon"])
    assert (found.accuracy, found.trace, found.kappa, found.hvps) == (None, None, None, 0)
    assert list(found.epsilon_sharpness) == [0.01, 0.05, 0.1, 0.5]
    one = measure_sharpness(model, None, samples(1), classifier=model[4], which=["head"])
    assert one.nc1 != one.nc1
    assert one.to_dict()["nc1"] is None
    with pytest.raises(ValueError, match=r"which must be some of .* got \['flatness'\]"):
        measure_sharpness(model, None, samples(), which=["flatness"])
    with pytest.raises(ValueError, match="rho must be a positive length"):
        epsilon_sharpness(model, None, samples(), rho=0.0)


class Scaled(nn.Module):
    """Its output is not that of its last linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.network = mlp()

    def forward(self, image: Tensor) -> Tensor:
        return self.network(image) * 3


def test_head_measures_are_none_if_the_classifier_does_not_give_the_output() -> None:
    found = measure_sharpness(Scaled(), None, samples(), classifier=(model := Scaled()).network[4], which=["head"])
    assert found.kappa is None  # the classifier of another network, which is not run
    found = measure_sharpness(model, None, samples(), classifier=model.network[4], which=["head"])
    assert (found.kappa, found.feature_trace, found.nc1) == (None, None, None)
    assert found.accuracy is not None


def test_ignored_targets_do_not_count() -> None:
    model, (image, target) = mlp(), samples()
    hidden = target.clone()
    hidden[8:] = -100
    found = measure_sharpness(model, None, (image, hidden), classifier=model[4], which=["head"])
    expected = measure_sharpness(model, None, (image[:8], target[:8]), classifier=model[4], which=["head"])
    for name in ("accuracy", "nc1", "kappa", "feature_trace"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-12), name


def test_report_text_states_the_error_of_the_trace() -> None:
    model = mlp()
    many = str(measure_sharpness(model, None, samples(), which=["trace"], min_probes=2, max_probes=2))
    assert "above 0.02 of the trace: take more probes" in many
    enough = str(measure_sharpness(model, None, samples(), which=["trace"], max_probes=30, tolerance=0.9))
    assert "standard error" in enough
    assert "above" not in enough
    one = str(measure_sharpness(model, None, samples(), which=["trace"], min_probes=1, max_probes=1))
    assert "one probe, error unknown" in one
    assert "nan" not in one


def test_report_leaves_network_and_random_state_unchanged() -> None:
    torch.manual_seed(0)
    model = VariedLayers()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    measure_sharpness(model, None, samples(), classifier=model.frozen, steps=5, max_probes=30)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert all(module.training for module in model.modules())
    assert not model.frozen._forward_hooks
    assert torch.equal(torch.get_rng_state(), random)
