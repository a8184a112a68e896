"""MoGD's functions: the meta gradient against second derivatives and closed forms, and the weights made from it."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from lightning_kd.core.precision import plain_attention
from lightning_kd.weak_labels import candidate_meta_gradient, likely_weights, updated_weights
from tests.two_processes import on_two_ranks


def linear(parameters, x):
    return x @ parameters["w"].T


def by_second_derivative(forward, parameters, x, candidates, meta_x, meta_target, weights, lr):
    """The definition: how the meta loss after the virtual step changes with each weight."""
    leaves = {name: p.detach().clone().requires_grad_() for name, p in parameters.items()}
    weights = weights.clone().requires_grad_()
    loss = (weights * candidates * -forward(leaves, x).log_softmax(1)).sum() / len(x)
    gradients = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
    moved = {name: p - lr * g for (name, p), g in zip(leaves.items(), gradients, strict=True)}
    return torch.autograd.grad(F.cross_entropy(forward(moved, meta_x), meta_target), weights)[0]


def problem(network, shape, samples=6, classes=4, meta=5):
    """Random samples, candidates and weights for a network in float64."""
    draw = torch.Generator().manual_seed(3)
    x, meta_x = (torch.randn(n, *shape, dtype=torch.float64, generator=draw) for n in (samples, meta))
    candidates = (torch.rand(samples, classes, generator=draw) < 0.5).double()
    candidates[range(samples), torch.arange(samples) % classes] = 1
    weights = torch.rand(samples, classes, dtype=torch.float64, generator=draw) * candidates
    weights /= weights.sum(1, keepdim=True)
    target = torch.randint(0, classes, (meta,), generator=draw)
    parameters = {name: p.detach() for name, p in network.double().named_parameters()}
    buffers = {name: b.clone() for name, b in network.named_buffers()}

    def forward(parameters, x):
        return functional_call(network, {**parameters, **{k: v.clone() for k, v in buffers.items()}}, (x,))

    return forward, parameters, x, candidates, meta_x, target, weights


def networks():
    torch.manual_seed(0)
    normed = [nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4)]
    return {
        "linear": (nn.Linear(5, 4), (5,)),
        "mlp": (nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4)), (5,)),
        "batch norm": (nn.Sequential(*normed).train(), (2, 4, 4)),
    }


@pytest.mark.parametrize("name", ["linear", "mlp", "batch norm"])
@pytest.mark.parametrize("start", ["zero", "confidence"])
def test_meta_gradient_equals_the_second_derivative(name, start):
    network, shape = networks()[name]
    *given, weights = problem(network, shape)
    weights = weights * (start == "confidence")
    found = candidate_meta_gradient(*given, weights, 0.3)
    expected = by_second_derivative(*given, weights, 0.3)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert found.abs().max() > 1e-3
    if start == "zero":
        torch.testing.assert_close(candidate_meta_gradient(*given, None, 0.3), found, rtol=0, atol=0)


class Attending(nn.Module):
    """A layer of attention over the features of a sample."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(3, 8), nn.Linear(8, 4)
        self.attend = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, x):
        return self.head(self.attend(self.embed(x)).mean(1))


@pytest.mark.parametrize("train", [True, False])
def test_meta_gradient_of_a_transformer_layer_equals_the_second_derivative(train):
    given = problem(Attending().train(train), (5, 3))
    found = candidate_meta_gradient(*given, 0.3)
    with plain_attention():
        expected = by_second_derivative(*given, 0.3)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert found.abs().max() > 1e-3
    assert torch.backends.mha.get_fastpath_enabled()


def test_meta_gradient_and_weights_of_a_toy_problem_equal_worked_numbers():
    parameters, x = {"w": torch.zeros(2, 1, dtype=torch.float64)}, torch.ones(1, 1, dtype=torch.float64)
    candidates, weights = torch.ones(1, 2), torch.zeros(1, 2, dtype=torch.float64)
    for meta_x, gradient, expected in ((x, [-0.5, 0.5], [1, 0]), (-x, [0.5, -0.5], [0, 1])):
        g = candidate_meta_gradient(linear, parameters, x, candidates, meta_x, torch.tensor([0]), weights, 0.1)
        assert g[0].tolist() == pytest.approx([0.1 * value for value in gradient])
        assert updated_weights(weights, g, candidates, 1.0)[0].tolist() == expected


def test_meta_gradient_of_a_linear_layer_equals_its_closed_form():
    network, shape = networks()["linear"]
    forward, parameters, x, candidates, meta_x, target, _ = problem(network, shape)
    candidates = torch.ones_like(candidates)
    p, q = forward(parameters, x).softmax(1), forward(parameters, meta_x).softmax(1)
    error = (q - F.one_hot(target, 4)) / len(meta_x)
    moved = x @ (error.T @ meta_x).T + error.sum(0)
    products = (p * moved).sum(1, keepdim=True) - moved
    g = candidate_meta_gradient(forward, parameters, x, candidates, meta_x, target, None, 0.5)
    torch.testing.assert_close(g, -0.5 / len(x) * products, rtol=0, atol=1e-14)
    # weighted by the network's probabilities it sums to 0, so one class gains and another loses
    torch.testing.assert_close((p * g).sum(1), torch.zeros(len(x), dtype=torch.float64), rtol=0, atol=1e-15)
    assert bool(((g > 0).any(1) & (g < 0).any(1)).all())


def test_step_against_the_meta_gradient_lowers_the_meta_loss():
    network, shape = networks()["mlp"]
    forward, parameters, x, candidates, meta_x, target, _ = problem(network, shape)
    lr = 0.01
    g = candidate_meta_gradient(forward, parameters, x, candidates, meta_x, target, None, lr)

    def meta_loss(weights):
        leaves = {name: p.clone().requires_grad_() for name, p in parameters.items()}
        loss = (weights * candidates * -forward(leaves, x).log_softmax(1)).sum() / len(x)
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        moved = {name: p - lr * d for (name, p), d in zip(leaves.items(), gradients, strict=True)}
        return F.cross_entropy(forward(moved, meta_x), target)

    start = meta_loss(torch.zeros_like(g))
    drop = start - meta_loss(-10 * g)
    assert drop.item() == pytest.approx(10 * float(g.square().sum()), rel=0.05)


def test_weights_do_not_depend_on_the_rate_or_on_repeated_samples():
    network, shape = networks()["mlp"]
    forward, parameters, x, candidates, meta_x, target, _ = problem(network, shape)
    zero = torch.zeros_like(candidates)

    def found(x, candidates, lr):
        return candidate_meta_gradient(forward, parameters, x, candidates, meta_x, target, None, lr)

    g = found(x, candidates, 0.1)
    weights = updated_weights(zero, g, candidates, 1.0)
    torch.testing.assert_close(updated_weights(zero, found(x, candidates, 0.7), candidates, 1.0), weights)
    twice = found(torch.cat([x, x]), torch.cat([candidates, candidates]), 0.1)
    torch.testing.assert_close(twice, torch.cat([g, g]) / 2, rtol=0, atol=1e-14)
    doubled = updated_weights(torch.cat([zero, zero]), twice, torch.cat([candidates, candidates]), 1.0)
    torch.testing.assert_close(doubled, torch.cat([weights, weights]))


def test_updated_weights_equal_worked_numbers():
    candidates = torch.tensor([[1, 1, 0], [0, 1, 0], [1, 1, 1], [1, 0, 1]], dtype=torch.uint8)
    weights = torch.tensor([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0], [1 / 3] * 3, [0.5, 0.0, 0.5]])
    gradient = torch.tensor([[-0.5, 0.25, -9.0], [0.0, 7.0, 0.0], [5.0, 5.0, 5.0], [0.5, -3.0, 0.1]])
    found = updated_weights(weights, gradient, candidates, 1.0)
    # row 1 has one candidate; in row 2 every candidate would lose all its weight
    expected = torch.tensor([[0.8, 0.2, 0.0], [0.0, 1.0, 0.0], [1 / 3] * 3, [0.0, 0.0, 1.0]])
    torch.testing.assert_close(found, expected)
    assert bool((found[candidates == 0] == 0).all())
    half = updated_weights(weights, gradient, candidates, 0.5)
    torch.testing.assert_close(half[0], torch.tensor([0.75, 0.375, 0.0]) / 1.125)
    whole = updated_weights(weights, gradient, candidates, 1.0, normalization="batch")
    raised = torch.tensor([[1.0, 0.25, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.4]])
    torch.testing.assert_close(whole, raised / raised.sum())
    nothing = updated_weights(weights[2:3], gradient[2:3], candidates[2:3], 1.0, normalization="batch")
    assert nothing.tolist() == [[0.0] * 3]


def test_nan_gradients_give_nan_weights():
    weights, gradient = torch.full((2, 2), 0.5), torch.tensor([[torch.nan, 0.1], [0.0, 0.0]])
    for normalization in ("example", "batch"):
        found = updated_weights(weights, gradient, torch.ones(2, 2), 1.0, normalization)
        assert bool(found[0].isnan().any())


def test_weights_of_a_perfect_network_with_all_candidates_are_finite():
    parameters = {"w": 400 * torch.eye(3)}
    x, candidates, target = torch.eye(3), torch.ones(3, 3), torch.arange(3)
    start = torch.full((3, 3), 1 / 3)
    g = candidate_meta_gradient(linear, parameters, x, candidates, x, target, start, 0.1)
    weights = updated_weights(start, g, candidates, 1.0)
    assert bool(weights.isfinite().all())
    torch.testing.assert_close(weights.sum(1), torch.ones(3))


def test_meta_gradient_leaves_no_gradient_on_the_network():
    network, shape = networks()["mlp"]
    forward, _, x, candidates, meta_x, target, weights = problem(network, shape)
    parameters = dict(network.named_parameters())
    found = candidate_meta_gradient(forward, parameters, x, candidates, meta_x, target, weights, 0.1)
    assert not found.requires_grad
    assert all(p.grad is None for p in network.parameters())


def test_likely_weights_are_normalized_probabilities_of_the_candidates():
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    found = likely_weights(logits, torch.tensor([[1, 0, 1]]))
    torch.testing.assert_close(found, torch.tensor([[1.0, 0.0, torch.e**2]]) / (1 + torch.e**2))


def test_wrong_arguments_raise():
    network, shape = networks()["linear"]
    forward, parameters, x, candidates, meta_x, target, weights = problem(network, shape)
    given = (forward, parameters, x, candidates, meta_x, target, weights, 0.1)

    def changed(**values):
        names = ("forward", "parameters", "x", "candidates", "meta_x", "meta_target", "weights", "lr")
        return candidate_meta_gradient(**{**dict(zip(names, given, strict=True)), **values})

    empty = candidates.clone()
    empty[2] = 0
    with pytest.raises(ValueError, match=r"^candidates must name at least one class a sample, got none in row 2"):
        changed(candidates=empty)
    with pytest.raises(ValueError, match=r"^candidates must name at least one class a sample"):
        updated_weights(weights, weights, empty, 1.0)
    with pytest.raises(ValueError, match=r"^meta_target must be between 0 and 3, got 0 to 4"):
        changed(meta_target=torch.tensor([0, 1, 2, 3, 4]))
    with pytest.raises(ValueError, match=r"^meta_target must be of one sample or more, got none"):
        changed(meta_x=meta_x[:0], meta_target=target[:0])
    with pytest.raises(ValueError, match=r"^candidates must be \[6, 4\], got \[6, 3\]"):
        changed(candidates=candidates[:, :3].clamp(max=1).index_fill(1, torch.tensor([0]), 1), weights=None)
    with pytest.raises(ValueError, match=r"^candidates must have a row for each of 6 samples, got 5"):
        changed(candidates=candidates[:5])
    with pytest.raises(ValueError, match=r"^weights must be \[6, 4\], got \[5, 4\]"):
        changed(weights=weights[:5])
    with pytest.raises(ValueError, match=r"^lr must be at least 0, got -1"):
        changed(lr=-1)
    with pytest.raises(ValueError, match=r"^normalization must be 'example' or 'batch', got 'row'"):
        updated_weights(weights, weights, candidates, 1.0, "row")
    with pytest.raises(ValueError, match=r"^step must be at least 0, got -1"):
        updated_weights(weights, weights, candidates, -1)


class BackwardOnly(torch.autograd.Function):
    """Has a gradient, but no derivative in forward mode."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


def test_layer_without_a_forward_mode_derivative_raises():
    network, shape = networks()["linear"]
    forward, *rest = problem(network, shape)

    def foreign(parameters, x):
        return BackwardOnly.apply(forward(parameters, x))

    with pytest.raises(RuntimeError, match=r"^forward has an operation without a derivative in forward mode .*'head'"):
        candidate_meta_gradient(foreign, *rest, 0.1)


def meta_gradient_on_rank():
    """The meta gradient of one of two processes, with its half of the samples and of the meta set."""
    rank = int(os.environ["LOCAL_RANK"])
    dist.init_process_group("gloo", rank=rank, world_size=2)
    network, shape = networks()["mlp"]
    forward, parameters, x, candidates, meta_x, target, weights = problem(network, shape, meta=4)
    mine, meta = slice(3 * rank, 3 * rank + 3), slice(2 * rank, 2 * rank + 2)
    given = (x[mine], candidates[mine], meta_x[meta], target[meta], weights[mine])
    return candidate_meta_gradient(forward, parameters, *given, 0.3).tolist()


def test_two_processes_give_the_meta_gradient_of_one():
    network, shape = networks()["mlp"]
    whole = candidate_meta_gradient(*problem(network, shape, meta=4), 0.3)
    first, second = on_two_ranks(meta_gradient_on_rank)
    torch.testing.assert_close(torch.tensor([*first, *second], dtype=torch.float64), whole, rtol=0, atol=1e-12)
