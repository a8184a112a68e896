"""Hessian-vector products, eigenvalues and traces, against dense Hessians and closed forms in float64."""

from __future__ import annotations

import math
import os
import random
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

from lightning_kd.metrics import (
    _batch_derivatives,
    _objective,
    gauss_newton_trace,
    hessian_eigenvalues,
    hessian_trace,
    hessian_vector_product,
    layer_relative_flatness,
    measure_sharpness,
    power_iteration,
    relative_flatness,
)
from lightning_kd.metrics._second_derivatives import FastSecondDerivatives
from tests.two_processes import on_two_ranks


def mlp(activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    """4-6-5-3, 83 parameters."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(4, 6), activation(), nn.Linear(6, 5), activation(), nn.Linear(5, 3)
    ).double()  # fmt: skip


def samples(count: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(count, 4, generator=generator, dtype=torch.float64), torch.arange(count) % 3


def sample_batches(sizes: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    image, target = samples(sum(sizes))
    return list(zip(image.split(list(sizes)), target.split(list(sizes)), strict=True))


def dense(model: nn.Module, names: Sequence[str] | None = None) -> Tensor:
    """The whole Hessian ``[P, P]``."""
    values = {n: p.detach() for n, p in model.named_parameters() if names is None or n in names}
    image, target = samples()

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split([v.numel() for v in values.values()])
        given = {n: part.view_as(v) for (n, v), part in zip(values.items(), parts, strict=True)}
        return F.cross_entropy(functional_call(model, given, (image,)), target)

    flat = torch.cat([v.reshape(-1) for v in values.values()])
    return torch.func.hessian(loss)(flat).detach()


class Quadratic(nn.Module):
    """``w^T H w / 2``, the same for every batch."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix = matrix
        self.w = nn.Parameter(torch.arange(1.0, len(matrix) + 1).to(matrix))

    def forward(self, image: Tensor) -> Tensor:
        return self.w @ self.matrix @ self.w / 2 + 0 * image.sum()


def loss_from_model(model: nn.Module, batch: Any) -> Tensor:
    return model(batch[0])


def test_hessian_vector_products_equal_the_dense_hessian() -> None:
    model = mlp()
    hessian = dense(model)
    vector = torch.randn(83, dtype=torch.float64)
    torch.testing.assert_close(
        hessian_vector_product(model, None, samples(), vector), hessian @ vector, rtol=1e-10, atol=1e-12
    )
    part = ["2.weight", "4"]
    some = dense(model, ["2.weight", "4.weight", "4.bias"])
    found = hessian_vector_product(model, None, samples(), vector[: len(some)], parameters=part, l2=0.5)
    torch.testing.assert_close(found, some @ vector[: len(some)] + 0.5 * vector[: len(some)], rtol=1e-10, atol=1e-12)


def test_products_with_fast_second_derivatives_equal_those_of_pytorch() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, 2, 1),
        nn.BatchNorm2d(4),
        nn.Tanh(),
        nn.Conv2d(4, 6, 3, groups=2, bias=False),
        nn.BatchNorm2d(6),
        nn.Tanh(),
        nn.Flatten(2),
        nn.Conv1d(6, 3, 2, dilation=2),
        nn.Flatten(),
        nn.LazyLinear(3),
    ).double()
    batch = torch.randn(5, 2, 9, 8, dtype=torch.float64), torch.arange(5) % 3
    model(batch[0])  # sets the statistics of batch norm
    model.eval()
    with torch.no_grad():
        for layer in (model[1], model[4]):
            layer.weight.uniform_(0.5, 2)
            layer.bias.normal_()
    parameters = list(model.parameters())
    vector = torch.randn(sum(p.numel() for p in parameters), dtype=torch.float64)
    gradients = torch.autograd.grad(F.cross_entropy(model(batch[0]), batch[1]), parameters, create_graph=True)
    expected = torch.autograd.grad(torch.cat([g.reshape(-1) for g in gradients]) @ vector, parameters)
    found = hessian_vector_product(model, None, batch, vector)
    torch.testing.assert_close(found, torch.cat([g.reshape(-1) for g in expected]), rtol=1e-10, atol=1e-12)
    with FastSecondDerivatives():
        for layers in (model[:1], model[:2]):
            assert type(layers(batch[0]).grad_fn).__name__ == "_OutputBackward"


def test_eigenvalues_trace_and_blocks_equal_the_dense_hessian() -> None:
    model = mlp()
    hessian = dense(model)
    values = torch.linalg.eigvalsh(hessian)
    found = hessian_eigenvalues(model, None, samples(), k=3, steps=60)
    assert found.values == pytest.approx(values.flip(0)[:3].tolist(), rel=1e-9)
    assert found.smallest == pytest.approx(float(values[0]), rel=1e-9)
    assert found.error < 1e-8
    assert (found.hvps, found.samples, found.dtype, len(found.parameters)) == (60, 12, "float64", 6)
    assert found.loss == pytest.approx(F.cross_entropy(model(samples()[0]), samples()[1]).item(), rel=1e-12)
    probes = torch.randint(0, 2, (16, 83), generator=torch.Generator().manual_seed(3)).double() * 2 - 1
    trace = hessian_trace(model, None, samples(), vectors=probes)
    forms = torch.einsum("ki,ij,kj->k", probes, hessian, probes)
    assert trace.quadratic_forms == pytest.approx(forms.tolist(), rel=1e-9)
    assert trace.value == pytest.approx(float(forms.mean()), rel=1e-9)
    assert trace.standard_error == pytest.approx(float(forms.std()) / 4, rel=1e-9)
    assert sum(trace.per_parameter.values()) == pytest.approx(trace.value, rel=1e-12)
    assert list(trace.per_layer) == ["0", "2", "4"]
    block = torch.einsum("ki,ij,kj->k", probes[:, :24], hessian[:24], probes).mean()
    assert trace.per_parameter["0.weight"] == pytest.approx(float(block), rel=1e-9)


def test_lanczos_and_power_iteration_follow_their_recurrences() -> None:
    model, hessian = mlp(), dense(mlp())
    start = torch.linspace(-1, 2, 83, dtype=torch.float64)
    v, before, alpha, beta = start / start.norm(), torch.zeros(83, dtype=torch.float64), [], [0.0]
    for _ in range(6):
        w = hessian @ v
        alpha.append(float(v @ w))
        w = w - alpha[-1] * v - beta[-1] * before
        beta.append(float(w.norm()))
        before, v = v, w / w.norm()
    found = hessian_eigenvalues(model, None, samples(), steps=6, start=start, offload=True)
    assert found.alpha == pytest.approx(alpha, rel=1e-7)
    assert found.beta == pytest.approx(beta[1:-1], rel=1e-7)
    v, quotients = start / start.norm(), []
    for _ in range(8):
        w = hessian @ v
        quotients.append(float(v @ w))
        v = w / w.norm()
    power = power_iteration(model, None, samples(), steps=8, tolerance=0, start=start)
    assert power.quotients == pytest.approx(quotients, rel=1e-9)
    assert (power.value, power.hvps) == (power.quotients[-1], 8)


def test_quadratic_has_the_eigenvalues_and_trace_of_its_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    matrix = matrix + matrix.T
    model, batch = Quadratic(matrix), samples(1)
    found = hessian_eigenvalues(model, loss_from_model, batch, k=6)
    assert found.values == pytest.approx(torch.linalg.eigvalsh(matrix).flip(0).tolist(), rel=1e-9)
    assert found.hvps == 6
    torch.testing.assert_close(hessian_vector_product(model, loss_from_model, batch, torch.ones(6)), matrix.sum(1))
    # one probe of signs gives the trace of a diagonal matrix; a double eigenvalue is found twice
    model = Quadratic(torch.diag(torch.tensor([3.0, 3, -5, 2])).double())
    trace = hessian_trace(model, loss_from_model, batch, min_probes=1, max_probes=1)
    assert trace.value == pytest.approx(3, rel=1e-12)
    assert math.isnan(trace.standard_error)
    normal = hessian_trace(model, loss_from_model, batch, vectors=torch.tensor([[0.5, 1.0, 2.0, 1.5]]))
    assert normal.value == pytest.approx(3 * 0.25 + 3 - 20 + 4.5)
    double = hessian_eigenvalues(model, loss_from_model, batch, k=4)
    assert double.values == pytest.approx([3, 3, 2, -5], rel=1e-9)
    assert double.smallest == pytest.approx(-5, rel=1e-9)
    power = power_iteration(model, loss_from_model, batch, tolerance=1e-9)
    assert power.value == pytest.approx(-5, rel=1e-6)


def test_traces_of_a_linear_softmax_at_zero_weights_equal_a_closed_form() -> None:
    model, (image, _) = nn.Linear(4, 3).double(), samples()
    nn.init.zeros_(model.weight), nn.init.zeros_(model.bias)
    expected = float(image.square().sum(1).mean()) * (1 - 1 / 3)
    trace = hessian_trace(model, None, samples(), parameters=["weight"], tolerance=0.05, max_probes=100)
    assert trace.probes % 10 == 0
    assert 30 <= trace.probes <= 100
    assert abs(trace.value - expected) < 4 * trace.standard_error
    gauss = gauss_newton_trace(model, samples(), parameters=["weight"], tolerance=0.05, max_probes=100)
    assert abs(gauss.value - expected) < 4 * gauss.standard_error


def test_zero_hessian_gives_zero_eigenvalues_and_trace() -> None:
    model = Quadratic(torch.zeros(4, 4).double())
    found = hessian_eigenvalues(model, loss_from_model, samples(), k=2)
    assert (found.values, found.smallest) == ([0, 0], 0)
    assert power_iteration(model, loss_from_model, samples()).value == 0
    assert hessian_trace(model, loss_from_model, samples()).value == 0
    # linear in the parameters: autograd has no second derivative to give
    assert power_iteration(nn.Linear(4, 1).double(), lambda m, b: m(b[0]).mean(), samples()).value == 0


@pytest.mark.parametrize("layer", ["0", "2", "4"])
def test_relative_flatness_of_a_layer_equals_its_definition(layer: str) -> None:
    model = mlp()
    weight = dict(model.named_parameters())[f"{layer}.weight"].detach()
    blocks = dense(model, [f"{layer}.weight"]).view(*weight.shape, *weight.shape)
    expected = float(torch.einsum("si,ti,sjtj->", weight, weight, blocks))
    found = layer_relative_flatness(model, None, samples(), layer, max_probes=300, tolerance=0.01)
    assert abs(found.value - expected) < 4 * found.standard_error
    assert found.standard_error < 0.1 * expected
    if layer == "4":
        feature = model[:4](samples()[0])
        assert relative_flatness(feature, weight, model[4](feature)) == pytest.approx(expected, rel=1e-9)


def test_relative_flatness_of_a_convolution_takes_filters_as_rows() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, (1, 2)), nn.Tanh(), nn.Flatten()).double()
    image, target = samples()
    target = target + 2 * (target == 1)
    weight = model[1].weight.detach()

    def loss(moved: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, {"1.weight": moved}, (image,)), target)

    rows, blocks = weight.flatten(1), torch.func.hessian(loss)(weight).detach().view(3, 2, 3, 2)
    expected = float(torch.einsum("si,ti,sjtj->", rows, rows, blocks))
    found = layer_relative_flatness(model, None, (image, target), "1", min_probes=200)
    assert abs(found.value - expected) < 4 * found.standard_error
    assert found.standard_error < 0.2 * abs(expected)


def test_rescaling_a_relu_network_changes_the_trace_not_relative_flatness() -> None:
    model = mlp(nn.ReLU)
    values = []
    for _ in range(2):
        kappa = layer_relative_flatness(model, None, samples(), "2", min_probes=30, max_probes=30).value
        values.append((hessian_trace(model, None, samples(), max_probes=30).value, kappa))
        with torch.no_grad():
            model[0].weight *= 5
            model[0].bias *= 5
            model[2].weight /= 5
    assert values[1][1] == pytest.approx(values[0][1], rel=1e-9)
    assert abs(values[1][0] / values[0][0]) > 2


def test_gauss_newton_trace_is_the_hessian_trace_of_relu_networks() -> None:
    for activation in (nn.ReLU, nn.Tanh):
        model, (image, _) = mlp(activation), samples()
        jacobian = torch.func.jacrev(lambda p, m=model, x=image: functional_call(m, p, (x,)))(
            {name: value.detach() for name, value in model.named_parameters()}
        )
        flat = torch.cat([part.flatten(2) for part in jacobian.values()], 2)
        p = model(image).softmax(1).detach()
        inner = torch.diag_embed(p) - p[:, :, None] * p[:, None]
        expected = float(torch.einsum("ncp,ncd,ndp->", flat, inner, flat)) / 12
        found = gauss_newton_trace(model, sample_batches([5, 7]), tolerance=0.05, max_probes=200)
        assert abs(found.value - expected) < 4 * found.standard_error
        assert found.standard_error < 0.1 * expected
        trace = float(dense(model).trace())
        assert (abs(trace - expected) < 1e-12) == (activation is nn.ReLU)


@pytest.mark.parametrize(("kept", "graphs"), [(2**31, {3}), (2500, {1, 2}), (0, {0})])
def test_batches_are_weighted_by_size_and_kept_graphs_change_nothing(
    kept: int, graphs: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, (image, target) = mlp(), samples()
    expected = hessian_eigenvalues(model, None, samples(), steps=8).values
    trace = hessian_trace(model, None, samples(), min_probes=10, max_probes=10).value
    monkeypatch.setattr(_batch_derivatives, "KEPT_BYTES", kept)
    for loader in (sample_batches([5, 5, 2]), DataLoader(TensorDataset(image, target), 5)):
        with _objective.objective(model, None, loader) as found:
            found.hvp(torch.ones(83))
            assert len(found._kept) in graphs
        assert hessian_eigenvalues(model, None, loader, steps=8).values == pytest.approx(expected, rel=1e-12)
        parts = hessian_trace(model, None, loader, min_probes=10, max_probes=10)
        assert parts.value == pytest.approx(trace, rel=1e-12)


@pytest.mark.slow
def test_compiled_network_has_the_same_eigenvalues() -> None:
    model = mlp()
    expected = hessian_eigenvalues(model, None, samples(), steps=5).values
    model.compile(backend="aot_eager")
    model(samples()[0])
    assert hessian_eigenvalues(model, None, samples(), steps=5).values == expected


class VariedLayers(nn.Module):
    """Batch norm, dropout, a frozen part, an integer buffer, an unused part, a tied weight, attention."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.dropout = nn.Dropout(0.5)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.unused = nn.Linear(2, 2)
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.inner.weight
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, image: Tensor) -> Tensor:
        self.calls += 1
        hidden = self.dropout(self.norm(self.inner(image)).relu()) + self.frozen(image)
        query = self.tied(hidden)[None, None]
        return F.scaled_dot_product_attention(query, query, query)[0, 0]


@pytest.mark.parametrize("surroundings", ["plain", "inference", "autocast"])
def test_measuring_leaves_model_gradients_and_random_state_unchanged(surroundings: str) -> None:
    torch.manual_seed(0)
    model = VariedLayers()
    model.norm.eval()
    model(torch.randn(8, 4)).square().mean().backward()
    image, target = samples()
    loader = DataLoader(TensorDataset(image, target), 5)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    pointers = [p.data_ptr() for p in model.parameters()]
    flags = [(module.training, name) for name, module in model.named_modules()]
    precision = (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)
    if surroundings == "inference":
        with torch.inference_mode():
            loader = [tuple(part + 0 for part in batch) for batch in loader]
    random = torch.get_rng_state()
    values = []
    contexts = {"plain": torch.no_grad(), "inference": torch.inference_mode(), "autocast": torch.autocast("cpu")}
    for context in (torch.enable_grad(), contexts[surroundings]):
        with context:
            values.append(hessian_eigenvalues(model, None, loader, steps=8).values[0])
            hessian_trace(model, None, loader, min_probes=10, max_probes=10)
    assert values[0] == values[1]
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    for name, p in model.named_parameters():
        assert p.grad is None if gradients[name] is None else torch.equal(p.grad, gradients[name])
    assert pointers == [p.data_ptr() for p in model.parameters()]
    assert flags == [(module.training, name) for name, module in model.named_modules()]
    assert precision == (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)
    assert torch.equal(torch.get_rng_state(), random)


def test_half_precision_is_computed_in_float32() -> None:
    half = mlp().bfloat16()
    whole = mlp().bfloat16().float()
    image, target = samples()
    given = (image.bfloat16(), target)
    found = hessian_eigenvalues(half, None, given, steps=10)
    assert found.dtype == "float32"
    assert found.values == hessian_eigenvalues(whole, None, given, steps=10).values
    assert half[0].weight.dtype == torch.bfloat16


def test_no_graph_stays_in_memory_after_a_call() -> None:
    model, alive = mlp(), []
    model[1].register_forward_hook(lambda module, args, output: alive.append(weakref.ref(output)))
    hessian_trace(model, None, sample_batches([5, 7]), min_probes=2, max_probes=2)
    assert len(alive) == 2
    assert not any(output() is not None for output in alive)


class Noisy(nn.Module):
    """Draws from all global generators, in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.network = mlp()

    def forward(self, image: Tensor) -> Tensor:
        return self.network(F.dropout(image, 0.5) + random.random() + np.random.rand())  # noqa: NPY002


def test_random_networks_draw_the_same_in_every_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    values = []
    for kept in (2**31, 2500, 0):  # all, some or no graphs are kept; the other batches are run again
        monkeypatch.setattr(_batch_derivatives, "KEPT_BYTES", kept)
        values.append(hessian_eigenvalues(Noisy(), None, sample_batches([5, 5, 2]), steps=6).values[0])
    assert values == pytest.approx([values[0]] * 3, rel=1e-10)


def test_exact_relative_flatness_and_gauss_newton_trace() -> None:
    model = mlp()
    for layer in ("0", "2", "4"):
        weight = dict(model.named_parameters())[f"{layer}.weight"].detach()
        blocks = dense(model, [f"{layer}.weight"]).view(*weight.shape, *weight.shape)
        found = layer_relative_flatness(model, None, sample_batches([5, 7]), layer, exact=True)
        assert found.value == pytest.approx(float(torch.einsum("si,ti,sjtj->", weight, weight, blocks)), rel=1e-9)
        assert (found.standard_error, found.hvps) == (0, min(weight.shape) * weight.shape[1])
    relu = mlp(nn.ReLU)
    gauss = gauss_newton_trace(relu, sample_batches([5, 7]), exact=True)
    assert gauss.value == pytest.approx(float(dense(relu).trace()), rel=1e-9)
    assert (gauss.standard_error, gauss.samples) == (0, 12)
    estimate = gauss_newton_trace(model, sample_batches([5, 7]), tolerance=0.03, max_probes=400)
    exact = gauss_newton_trace(model, sample_batches([5, 7]), exact=True)
    assert abs(estimate.value - exact.value) < 4 * estimate.standard_error
    assert sum(exact.per_parameter.values()) == pytest.approx(exact.value, rel=1e-12)


def test_channels_last_convolutions_are_measured_in_contiguous_memory() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten()).to(memory_format=torch.channels_last)
    image = torch.randn(4, 2, 3, 3).contiguous(memory_format=torch.channels_last)
    seen = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        seen.append(batch[0].is_contiguous() and model[0].weight.is_contiguous())
        return F.cross_entropy(model(batch[0]), batch[1])

    hessian_eigenvalues(model, loss, (image, torch.arange(4) % 3), steps=2)
    assert seen
    assert all(seen)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)


class Shuffled:
    """Gives other samples in each pass."""

    def __init__(self) -> None:
        self.passes = 0

    def __iter__(self) -> Any:
        self.passes += 1
        return iter([(samples()[0] + self.passes, samples()[1])])


def test_wrong_inputs_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    with monkeypatch.context() as patch:
        patch.setattr(_batch_derivatives, "KEPT_BYTES", 0)
        with pytest.raises(ValueError, match="every pass must give the same samples"):
            hessian_eigenvalues(model, None, Shuffled(), steps=5)
    with pytest.raises(TypeError, match="again and again"):
        hessian_trace(model, None, iter([samples()]))
    with pytest.raises(ValueError, match="no trainable parameter"):
        hessian_trace(mlp().requires_grad_(False), None, samples())
    with pytest.raises(ValueError, match="the loss is nan"):
        hessian_trace(model, None, (samples()[0] * math.nan, samples()[1]))
    with pytest.raises(ValueError, match="does not depend on the parameters"):
        hessian_trace(model, lambda m, b: b[0].mean(), samples())
    with pytest.raises(ValueError, match="scalar tensor, got"):
        hessian_trace(model, lambda m, b: m(b[0]), samples())
    with pytest.raises(ValueError, match=r"vector must be \[83\]"):
        hessian_vector_product(model, None, samples(), torch.ones(3))
    with pytest.raises(ValueError, match="at least one"):
        hessian_trace(model, None, [])
    with pytest.raises(ValueError, match=r"parameters must name .* got \['nope'\]"):
        hessian_trace(model, None, samples(), parameters=["nope"])
    with pytest.raises(ValueError, match="k must be from 1 to"):
        hessian_eigenvalues(model, None, samples(), k=31)
    with pytest.raises(ValueError, match="no weight with rows"):
        layer_relative_flatness(model, None, samples(), "1")


def measured_on_rank() -> list[float]:
    rank = int(os.environ["LOCAL_RANK"])
    dist.init_process_group("gloo", rank=rank, world_size=2)
    share = sample_batches([5, 5, 2])[1:] if rank else sample_batches([5, 5, 2])[:1]
    model = mlp()
    eigenvalues = hessian_eigenvalues(model, None, share, steps=15)
    trace = hessian_trace(model, None, share, min_probes=10, max_probes=10)
    gauss = gauss_newton_trace(model, share, min_probes=10, max_probes=10)
    empty = hessian_trace(model, None, sample_batches([5, 5, 2]) if rank else [], min_probes=10, max_probes=10)
    calls = 0  # of the loss: rank 1 raises in the first pass, and on the next try in a later one

    def sometimes(model: nn.Module, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if rank and calls in (2, 5):
            raise OSError("a damaged file")
        return F.cross_entropy(model(batch[0]), batch[1])

    messages = []
    for loss, data in ((sometimes, share), (sometimes, share), (None, iter(share) if rank else share)):
        try:
            measure_sharpness(model, loss, data, which=["epsilon"])
        except (OSError, RuntimeError, TypeError) as error:
            messages.append(type(error).__name__)
    assert messages == (["OSError", "OSError", "TypeError"] if rank else ["RuntimeError"] * 3), messages
    dist.destroy_process_group()
    return [eigenvalues.values[0], trace.value, gauss.samples, eigenvalues.loss, empty.value]


def test_two_processes_measure_as_one() -> None:
    model = mlp()
    expected = [
        hessian_eigenvalues(model, None, samples(), steps=15).values[0],
        hessian_trace(model, None, samples(), min_probes=10, max_probes=10).value,
        12,
        hessian_eigenvalues(model, None, samples(), steps=1).loss,
        hessian_trace(model, None, samples(), min_probes=10, max_probes=10).value,
    ]
    both = on_two_ranks(measured_on_rank)
    assert both[0] == both[1]
    assert both[0] == pytest.approx(expected, rel=1e-12)
