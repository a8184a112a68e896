"""Shifting the layers of a network: from one pass, without side effects, errors, and two processes."""

from __future__ import annotations

import copy
import os
import random
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_kd.core import Batch
from lightning_kd.flatness import ShiftReport, shift_conv2d, shift_linear, shift_network
from lightning_kd.metrics.classifier_head import relative_flatness
from tests.two_processes import on_two_ranks


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Net(nn.Module):
    """A convolution, a layer that is called twice, dropout, running statistics, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(4, 6, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm1d(6)
        self.twice = nn.Linear(6, 6)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(6, 3)

    def forward(self, image: Tensor) -> Tensor:
        x = self.norm(self.conv(image).tanh().mean((2, 3)))
        x = self.twice(self.twice(x).tanh()).tanh()
        return self.fc(self.drop(x))


def net() -> Net:
    made = Net().double().train()
    made.norm.running_mean.copy_(normal(6, seed=9))
    made.drop.eval()
    return made


def samples(n: int = 3, seed: int = 1, size: int = 2) -> Batch:
    return Batch(normal(n, 4, size, size, seed=seed), torch.arange(n) % 3)


def logits(model: nn.Module, batch: Batch) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(model).eval()(batch.image)


def test_layers_are_shifted_from_one_pass() -> None:
    model, batch = net(), samples(2)
    before, expected = copy.deepcopy(model), logits(model, batch)
    report = shift_network(model, ["conv", "twice", "fc"], batch)
    assert torch.allclose(logits(model, batch), expected, atol=1e-12)
    assert [layer.status for layer in report.layers] == ["shifted"] * 3
    assert report.layers[0].rows == 8
    assert report.layers[1].rows == 4  # two calls
    assert all(layer.norm_after < layer.norm_before for layer in report.layers)
    assert report.loss_after == pytest.approx(report.loss_before, abs=1e-12)
    assert report.loss_before == pytest.approx(F.cross_entropy(expected, batch.target).item(), abs=1e-12)
    with torch.no_grad():
        before.eval()
        conv = shift_conv2d(before.conv.weight, before.conv.bias, batch.image, 1, 1, 1, 2)
        first = before.norm(before.conv(batch.image).tanh().mean((2, 3)))
        second = before.twice(first).tanh()
        twice = shift_linear(before.twice.weight, before.twice.bias, torch.cat([first, second]))
        feature = before.twice(second).tanh()
        fc = shift_linear(before.fc.weight, before.fc.bias, feature)
    for layer, shift in (("conv", conv), ("twice", twice), ("fc", fc)):
        assert torch.allclose(getattr(model, layer).weight, shift.weight, atol=1e-12)
    assert report.layers[0].rank == conv.rank
    assert report.kappa_before == pytest.approx(relative_flatness(feature, before.fc.weight, expected), abs=1e-13)
    assert report.kappa_after == pytest.approx(relative_flatness(feature, fc.weight, expected), abs=1e-13)
    assert report.kappa_after <= report.kappa_before


@pytest.mark.parametrize("mode", ["fixed", "joint", "free"])
@pytest.mark.parametrize("n", [2, 5])
def test_one_batch_several_batches_and_gram_matrix_give_the_same_shift(mode: str, n: int) -> None:
    whole, parts, grams = net(), net(), net()
    batch = samples(n)
    loader = [(image[None], target[None]) for image, target in zip(batch.image, batch.target, strict=True)]
    shift_network(whole, None, batch, mode=mode)
    shift_network(parts, None, loader, mode=mode)
    assert torch.allclose(whole.fc.weight, parts.fc.weight, atol=1e-12)
    assert torch.allclose(whole.fc.bias, parts.fc.bias, atol=1e-12)
    report = shift_network(grams, None, loader * 4, mode=mode)  # more rows than dimensions
    assert report.layers[0].rows == 4 * n
    assert torch.allclose(whole.fc.weight, grams.fc.weight, atol=1e-9)


def test_shift_keeps_random_states_buffers_modes_and_gradients() -> None:
    model, batch = net(), samples()
    parameters, keys = list(model.parameters()), list(model.state_dict())
    buffers = [b.clone() for b in model.buffers()]
    model.conv.weight.requires_grad_(False)
    model.fc.bias.grad = torch.ones_like(model.fc.bias)

    class Drawing(list):
        def __iter__(self) -> Any:
            torch.rand(1), np.random.rand(), random.random()  # noqa: NPY002
            return super().__iter__()

    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    with torch.autocast("cpu", torch.bfloat16):
        shift_network(model, ["conv", "fc"], Drawing([batch]), held_out=batch)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (np.random.get_state()[1].tolist(), random.getstate())  # noqa: NPY002
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert list(model.state_dict()) == keys
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))
    assert [m.training for m in (model, model.norm, model.drop)] == [True, True, False]
    assert [p.requires_grad for p in (model.conv.weight, model.fc.weight)] == [False, True]
    assert torch.equal(model.fc.bias.grad, torch.ones_like(model.fc.bias))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_shift_of_full_rank_leaves_the_network_unchanged() -> None:
    model = net()
    state = copy.deepcopy(model.state_dict())
    report = shift_network(model, None, samples(40), held_out=samples(5), guard=0.0)
    assert report.identity
    assert not report.undone
    assert report.loss_after == report.loss_before
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))


def test_selection_class_means_shifts_by_the_mean_features() -> None:
    model, batch = net(), samples(7, size=3)
    feature: list[Tensor] = []
    handle = model.fc.register_forward_pre_hook(lambda module, args: feature.append(args[0]))
    logits(model, batch)
    model.eval()(batch.image)
    model.train()
    handle.remove()
    means = torch.stack([feature[-1][batch.target == c].mean(0) for c in range(3)])
    expected = shift_linear(model.fc.weight, model.fc.bias, means)
    report = shift_network(model, None, [batch], selection="class_means", num_classes=3)
    assert torch.allclose(model.fc.weight, expected.weight, atol=1e-12)
    assert (report.layers[0].rows, report.layers[0].rank) == (3, expected.rank)
    with pytest.raises(ValueError, match=r"^class means need one input \[N, d\]"):
        shift_network(net(), ["conv"], batch, selection="class_means", num_classes=3)


def test_tokens_count_as_rows_and_later_changes_of_inputs_do_not_matter() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            out = self.fc(input=x)
            x.zero_()
            return out.mean(1)

    model, image = Tokens().double(), normal(2, 3, 8)
    expected = shift_linear(model.fc.weight, model.fc.bias, image.clone())
    report = shift_network(model, "fc", [image.clone() for _ in range(1)], forward=lambda x: model(x.clone()))
    assert torch.equal(model.fc.weight, expected.weight)
    assert (report.layers[0].rows, report.loss_before, report.kappa_before) == (6, None, None)


def test_linear_layers_of_a_transformer_are_shifted() -> None:
    """The fast path of eval mode, which calls no submodule, must be off during the shift."""
    model = nn.Sequential(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Flatten(), nn.Linear(24, 3)
    ).double()
    image = normal(2, 3, 8)
    expected = copy.deepcopy(model).eval()(image)
    report = shift_network(model, ["0.linear1", "0.linear2"], Batch(image, torch.arange(2)))
    assert [layer.rows for layer in report.layers] == [6, 6]
    assert torch.allclose(model.eval()(image), expected, atol=1e-12)
    assert torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(ValueError, match=r"layer '0.self_attn.out_proj' was not called"):
        shift_network(model, ["0.self_attn.out_proj"], image)


@pytest.mark.slow
def test_layers_of_a_compiled_network_are_shifted() -> None:
    batch = samples(2)
    for compiled in (net(), torch.compile(net())):
        model = compiled._orig_mod if hasattr(compiled, "_orig_mod") else compiled
        if model is compiled:
            model.compile()
        compiled.eval()(batch.image)  # compiles; hooks that are added later do not fire
        compiled.train()
        plain = net()
        shift_network(plain, ["fc"], batch)
        shift_network(compiled, ["fc"] if model is compiled else ["_orig_mod.fc"], batch)
        assert torch.allclose(model.fc.weight, plain.fc.weight, atol=1e-12)


def trained(optimizer: type[torch.optim.Optimizer], **options: Any) -> tuple[Net, torch.optim.Optimizer]:
    model = net()
    made = optimizer(model.parameters(), lr=0.1, **options)
    for seed in range(3):
        made.zero_grad()
        F.cross_entropy(model(samples(6, seed=seed).image), samples(6).target).backward()
        made.step()
    made.zero_grad()
    return model, made


@pytest.mark.parametrize("policy", ["project", "keep"])
def test_momentum_restores_removed_directions_only_with_policy_keep(policy: str) -> None:
    model, optimizer = trained(torch.optim.SGD, momentum=0.9)
    before = optimizer.state[model.fc.weight]["momentum_buffer"].clone()
    shift_network(model, None, samples(2), optimizer=optimizer, momentum=policy)
    shifted = model.fc.weight.detach().clone()
    feature: list[Tensor] = []
    handle = model.fc.register_forward_pre_hook(lambda module, args: feature.append(args[0]))
    logits(model.eval(), samples(2))
    model(samples(2).image)
    handle.remove()
    basis = torch.linalg.svd(feature[-1].detach(), full_matrices=False)[2]
    outside = torch.eye(6).double() - basis.T @ basis
    assert (shifted @ outside).abs().max() < 1e-12
    for _ in range(300):
        model.fc.weight.grad = torch.zeros_like(model.fc.weight)
        optimizer.step()
    drift = (model.fc.weight.detach() - shifted) @ outside
    expected = -0.1 * 0.9 / (1 - 0.9) * before @ outside if policy == "keep" else torch.zeros_like(drift)
    assert torch.allclose(drift, expected, atol=1e-12)
    assert (before @ outside).abs().max() > 1e-3


@pytest.mark.parametrize("mode", ["fixed", "joint", "free"])
def test_first_moment_of_adam_is_shifted_like_a_weight_or_set_to_zero(mode: str) -> None:
    model, optimizer = trained(torch.optim.AdamW)
    state, of_bias = (copy.deepcopy(optimizer.state[p]) for p in (model.fc.weight, model.fc.bias))
    twin = copy.deepcopy(model)
    shift_network(model, None, samples(2), mode=mode, optimizer=[optimizer])
    moved = optimizer.state[model.fc.weight]
    assert torch.equal(moved["exp_avg_sq"], state["exp_avg_sq"])
    # a momentum is shifted as a weight is
    with torch.no_grad():
        twin.fc.weight.copy_(state["exp_avg"])
        twin.fc.bias.copy_(of_bias["exp_avg"])
    shift_network(twin, None, samples(2), mode=mode)
    assert torch.allclose(moved["exp_avg"], twin.fc.weight, atol=1e-14)
    assert torch.allclose(optimizer.state[model.fc.bias]["exp_avg"], twin.fc.bias, atol=1e-14)
    shift_network(model, None, samples(1), optimizer=optimizer, momentum="zero")
    assert not moved["exp_avg"].any()
    assert optimizer.state[model.fc.bias]["exp_avg"].any()  # in mode fixed the bias and its momentum stay


def test_guard_restores_weights_and_momenta() -> None:
    model, optimizer = trained(torch.optim.SGD, momentum=0.9)
    model.fc.weight.data *= 30  # large logits, so that a shift changes the loss
    state, momenta = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict()["state"])
    image = 3 * normal(30, 4, 2, 2, seed=5)
    held_out = Batch(image, logits(model, Batch(image, torch.zeros(30))).argmax(1))
    arguments = {"held_out": held_out, "optimizer": optimizer, "mode": "joint"}
    report = shift_network(model, ["conv", "fc"], samples(1), guard=0.0, **arguments)
    assert report.undone
    assert report.held_out_after > report.held_out_before
    assert report.reason.startswith("the held-out loss rises from")
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    after = optimizer.state_dict()["state"]
    assert all(torch.equal(momenta[k]["momentum_buffer"], after[k]["momentum_buffer"]) for k in momenta)
    assert not shift_network(model, ["conv", "fc"], samples(1), guard=1e6, **arguments).undone


def test_guard_is_relative_to_the_absolute_value_of_a_negative_loss() -> None:
    def loss_fn(output: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(output, batch.target) - 100

    options = {"held_out": samples(30, seed=5), "loss_fn": loss_fn, "guard": 1.0}
    report = shift_network(net(), None, samples(1), **options)
    assert report.held_out_before < report.held_out_after < 0  # rises by less than 1.0 of its absolute value
    assert not report.undone


def test_interrupted_shift_is_undone() -> None:
    model = net()
    state = copy.deepcopy(model.state_dict())
    calls = iter(range(2))

    def forward(batch: Batch) -> Tensor:
        if next(calls) == 1:
            raise KeyboardInterrupt
        return model(batch.image)

    with pytest.raises(KeyboardInterrupt):
        shift_network(model, None, samples(2), forward=forward)
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))


def test_report_has_a_dict_a_table_and_a_summary() -> None:
    report = shift_network(net(), ["conv", "fc"], samples(2), held_out=samples(4))
    plain = report.to_dict()
    assert plain["layers"][1]["name"] == "fc"
    assert ShiftReport(**{**plain, "layers": report.layers}) == report
    lines = str(report).splitlines()
    assert len({len(line) for line in lines[:3]}) == 1
    assert [line.split()[0] for line in lines if line] == [
        "layer",
        "conv",
        "fc",
        "before",
        "loss",
        "held-out",
        "kappa",
        "2",
    ]
    assert report.summary().startswith("shifted: layer 'conv' rank ")


def test_a_module_with_two_paths_is_one_layer() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a = nn.Linear(6, 6)
            self.b = self.a

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).tanh())

    image = normal(2, 6)
    for layers in (["b"], ["a", "b"]):
        model, plain = Twice().double(), Twice().double()
        report = shift_network(model, layers, image)
        assert [(layer.name, layer.rows, layer.rank) for layer in report.layers] == [("a", 4, 4)]
        assert torch.allclose(model(image), plain(image), atol=1e-12)


def test_images_pairs_and_named_batches_are_accepted_as_data() -> None:
    model, image = nn.Linear(6, 3).double(), normal(2, 6)
    report = shift_network(model, None, [image, normal(2, 6, seed=1)])  # batches of images, no (image, target)
    assert (report.samples, report.loss_before, report.layers[0].rows) == (4, None, 4)
    assert shift_network(model, None, (image, torch.arange(2))).loss_before is not None
    named = [{"name": ["one", "two"], "image": image}]
    assert shift_network(model, None, named, forward=lambda batch: model(batch["image"])).samples == 2
    with pytest.raises(TypeError, match=r"^a batch must hold a tensor, got list"):
        shift_network(model, None, [["one", "two"]], forward=lambda batch: model(image))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_shift_runs_without_tf32_and_keeps_small_directions() -> None:
    model, image = nn.Linear(8, 3).cuda(), torch.diag(torch.tensor([1.0] * 6 + [1e-4] + [0.0])).cuda()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        report = shift_network(model, None, image)  # must run without TF32
    finally:
        torch.set_float32_matmul_precision(before)
    assert report.layers[0].rank == 7


class OwnForward(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def changed(change: str) -> nn.Module:
    model = net()
    if change == "parametrised":
        nn.utils.parametrizations.weight_norm(model.fc)
    elif change == "weight norm":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            nn.utils.weight_norm(model.fc)
    elif change == "own forward":
        model.fc = OwnForward(6, 3).double()
    elif change == "tied":
        model.other = nn.Linear(6, 3)
        model.other.weight = model.fc.weight
    elif change == "never called":
        model.other = nn.Linear(6, 3).double()
    elif change == "no bias":
        model.fc = nn.Linear(6, 3, bias=False).double()
    elif change == "transposed":
        model.up = nn.ConvTranspose2d(4, 4, 1).double()
    elif change == "nan":
        model.twice.bias.data[0] = torch.nan
    elif change == "dead":
        model.twice = nn.Sequential(nn.Linear(6, 6), nn.Threshold(9.0, 0.0)).double()
    return model


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ("parametrised", {}, "layer 'fc' has a parametrised weight"),
        ("weight norm", {}, "layer 'fc' has a parametrised weight"),
        ("own forward", {}, "layer 'fc' is a OwnForward with a forward of its own"),
        ("tied", {"layers": "fc"}, "layer 'fc' shares its parameters"),
        ("never called", {}, "layer 'other' was not called"),
        ("transposed", {"layers": ["up"]}, "layer 'up' is a ConvTranspose2d"),
        ("", {"layers": ["norm"]}, "layer 'norm' is a BatchNorm1d"),
        ("", {"layers": ["head"]}, "layers: no module 'head' in Net; it has"),
        ("", {"layers": []}, "layers is empty"),
        ("no bias", {"mode": "free"}, "mode 'free' changes the bias, and at layer 'fc' there is none"),
        ("", {"mode": "free", "data": samples(1)}, "mode 'free' with one row"),
        ("nan", {}, "inputs of layer 'fc' must be finite"),
        ("dead", {}, "inputs of layer 'fc' have rank 0"),
        (
            "",
            {"layers": "conv", "mode": "free", "data": torch.ones(2, 4, 4, 4)[:, :, :1, :1]},
            "inputs of layer 'conv'",
        ),
        ("", {"layers": "conv", "data": torch.zeros(2, 4, 2, 2)}, "inputs of layer 'conv' have rank 0"),
        ("", {"num_classes": 5}, "the shift set lacks class 3 and 1 more"),
        ("", {"num_classes": 2}, r"target must be in 0\.\.1"),
        ("", {"data": iter([samples()])}, "samples must be a batch, or batches that can be iterated more"),
        ("", {"data": []}, "there is no sample"),
        ("", {"guard": 0.1}, "guard=0.1 compares"),
        ("", {"guard": 0.1, "held_out": samples().image}, "guard=0.1 compares the loss"),
        ("", {"momentum": "half"}, "momentum must be one of"),
        ("", {"selection": "some"}, "selection must be one of"),
    ],
)
def test_wrong_layers_data_and_arguments_raise_and_change_nothing(change: str, arguments: dict, message: str) -> None:
    model = changed(change)
    state = copy.deepcopy(model.state_dict())
    given = {"layers": None, "data": samples(), **arguments}
    with pytest.raises(ValueError, match=f"^{message}"):
        shift_network(model, given.pop("layers"), given.pop("data"), **given)
    pairs = zip(state.values(), model.state_dict().values(), strict=True)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)
    assert not any(m._forward_hooks for m in model.modules())


def test_normalised_layer_outputs_and_too_many_classes_warn() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4)).double()
    with pytest.warns(UserWarning, match="layer|classifier") as caught:
        shift_network(model, ["0", "3"], Batch(normal(3, 8), torch.arange(3)), num_classes=4, force=True)
    texts = [str(w.message) for w in caught]
    assert any("the output of layer '0' is normalised" in text for text in texts)
    assert any("classifier '3' has 4 classes on 4 features" in text for text in texts)
    assert not any("layer '3' is normalised" in text for text in texts)
    between = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Dropout(), nn.LayerNorm(4), nn.Linear(4, 2))
    with pytest.warns(UserWarning, match="the output of layer '0' is normalised"):
        shift_network(between.double(), ["0"], Batch(normal(3, 8), torch.arange(3) % 2))


def plain_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 3)
    ).double()


def _shift_share(sizes: list[int], mode: str, selection: str, layers: list[str]) -> tuple[list, dict]:
    rank = int(os.environ["LOCAL_RANK"])
    if not dist.is_initialized():
        dist.init_process_group("gloo", rank=rank, world_size=2)
    start = sum(sizes[:rank])
    batch = Batch(normal(sum(sizes), 2, 4, 4), torch.arange(sum(sizes)) % 3)
    share = slice(start, start + sizes[rank])
    model = plain_net()
    mine = Batch(batch.image[share], batch.target[share])
    loader = [mine] if sizes[rank] else []
    options = {"mode": mode, "selection": selection, "num_classes": 3, "guard": 9.0}
    # another rtol, as if the second machine rounded differently: the first process decides
    report = shift_network(model, layers, loader, held_out=loader, rtol=0.9 if rank else None, **options)
    return [p.tolist() for p in model.parameters()], report.to_dict()


CASES = [
    ([3, 4], "fixed", "all", ["0", "3", "5"]),  # the linear layers by their rows, the convolution by its Gram matrix
    ([5, 0], "free", "all", ["5"]),
    ([7, 9], "joint", "all", ["5"]),
    ([2, 5], "fixed", "class_means", ["5"]),
]


def _all_cases() -> list:
    return [_shift_share(*case) for case in CASES]


def test_two_processes_shift_as_one() -> None:
    first, second = on_two_ranks(_all_cases)
    assert first == second
    for (parameters, report), (sizes, mode, selection, layers) in zip(first, CASES, strict=True):
        n = sum(sizes)
        batch, model = Batch(normal(n, 2, 4, 4), torch.arange(n) % 3), plain_net()
        alone = shift_network(
            model, layers, batch, held_out=batch, mode=mode, selection=selection, num_classes=3, guard=9.0
        )
        for found, parameter in zip(parameters, model.parameters(), strict=True):
            assert torch.allclose(torch.tensor(found, dtype=torch.float64), parameter, atol=1e-12)
        expected = alone.to_dict()
        for mine, other in zip(report["layers"], expected["layers"], strict=True):
            assert mine == pytest.approx(other) if not isinstance(mine["rank"], list) else mine["rank"] == other["rank"]
        for name in ("samples", "loss_before", "loss_after", "held_out_after", "kappa_before", "kappa_after"):
            assert report[name] == pytest.approx(expected[name], abs=1e-12)


def test_half_precision_network_is_shifted_without_directions_of_rounding() -> None:
    model = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 3)).bfloat16()
    report = shift_network(model, None, Batch(normal(6, 20).repeat(3, 1).float(), torch.arange(18) % 3))
    assert model[2].weight.dtype == torch.bfloat16
    assert report.layers[0].rank <= 6  # without the directions that rounding adds
    assert report.layers[0].norm_after < report.layers[0].norm_before
    assert report.loss_after == pytest.approx(report.loss_before, rel=0.02)


def test_relative_flatness_is_none_for_multi_label_targets() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(8, 3)).double()
    batch = normal(5, 8), torch.ones(5, 3)
    report = shift_network(
        model, "1", [batch], loss_fn=lambda output, batch: F.binary_cross_entropy_with_logits(output, batch[1].double())
    )
    assert report.loss_before is not None
    assert report.kappa_before is None
