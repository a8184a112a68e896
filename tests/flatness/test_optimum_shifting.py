"""The algebra of optimum shifting: worked numbers, invariants, and agreement with a plain SVD."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, hessian

from lightning_kd.flatness.optimum_shifting import shift_conv2d, shift_from_gram, shift_linear
from lightning_kd.metrics.classifier_head import feature_hessian_trace, relative_flatness

WEIGHT = torch.tensor([[1.0, 2, 3], [0, 1, -1]], dtype=torch.float64)
BIAS = torch.tensor([0.5, -0.5], dtype=torch.float64)
INPUTS = torch.tensor([[1.0, 0, 1], [0, 1, 1]], dtype=torch.float64)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def with_singular_values(n: int, d: int, sigma: list[float], seed: int = 0) -> Tensor:
    left, right = torch.linalg.qr(normal(n, n, seed=seed))[0], torch.linalg.qr(normal(d, d, seed=seed + 1))[0]
    k = len(sigma)
    return left[:, :k] @ torch.diag(torch.tensor(sigma, dtype=torch.float64)) @ right[:, :k].T


def svd_shift(weight: Tensor, inputs: Tensor, rtol: float) -> tuple[Tensor, int]:
    _, sigma, right = torch.linalg.svd(inputs.double(), full_matrices=False)
    basis = right[sigma > rtol * sigma[0]]
    return weight.double() @ basis.T @ basis, len(basis)


def gram_of(inputs: Tensor) -> dict[str, Tensor | int]:
    return {"gram": inputs.T @ inputs, "total": inputs.sum(0), "count": len(inputs)}


@pytest.mark.parametrize(
    ("mode", "weight", "bias", "rank"),
    [("fixed", [[1.0, 1]], [1.0], 1), ("joint", [[1.0, 1]], [1.0], 1), ("free", [[0.0, 0]], [3.0], 0)],
)
def test_shift_of_one_row_gives_worked_numbers(mode: str, weight: list, bias: list, rank: int) -> None:
    given = torch.tensor([[2.0, 0]]), torch.tensor([1.0])
    shift = shift_linear(*given, torch.tensor([[1.0, 1]]), mode)
    assert torch.allclose(shift.weight, torch.tensor(weight), atol=1e-6)
    assert torch.allclose(shift.bias, torch.tensor(bias), atol=1e-6)
    assert (shift.rank, shift.status, shift.weight.dtype) == (rank, "shifted", torch.float32)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("mode", "weight", "bias", "rank"),
    [
        ("fixed", [[1, 2, 3], [-2 / 3, 1 / 3, -1 / 3]], [0.5, -0.5], 2),
        ("joint", [[0.5, 1.5, 2], [-0.7, 0.3, -0.4]], [2, -0.4], 2),
        ("free", [[-0.5, 0.5, 0], [-0.5, 0.5, 0]], [5, -1], 1),
    ],
)
def test_shift_of_two_rows_gives_worked_numbers_and_keeps_outputs(
    mode: str, weight: list, bias: list, rank: int, streamed: bool
) -> None:
    if streamed:
        shift = shift_from_gram(WEIGHT, BIAS, mode=mode, **gram_of(INPUTS))
    else:
        shift = shift_linear(WEIGHT, BIAS, INPUTS, mode)
    assert shift.weight.tolist() == [pytest.approx(row, abs=1e-12) for row in weight]
    assert shift.bias.tolist() == pytest.approx(bias, abs=1e-12)
    assert (shift.rank, shift.status) == (rank, "shifted")
    expected = torch.tensor([[4.5, -1.5], [5.5, -0.5]], dtype=torch.float64)
    assert torch.allclose(F.linear(INPUTS, shift.weight, shift.bias), expected, atol=1e-12)
    assert shift.weight_norm_before**2 == pytest.approx(16)
    assert shift.weight_norm_after == pytest.approx(shift.weight.norm().item())


def test_shift_lowers_feature_hessian_trace_and_relative_flatness() -> None:
    logits = F.linear(INPUTS, WEIGHT, BIAS)
    shifted = shift_linear(WEIGHT, BIAS, INPUTS).weight
    assert feature_hessian_trace(WEIGHT, logits) == pytest.approx(0.0443972, abs=1e-7)
    assert feature_hessian_trace(shifted, logits) == pytest.approx(0.0411085, abs=1e-7)
    assert relative_flatness(INPUTS, WEIGHT, logits) == pytest.approx(0.0887943, abs=1e-7)
    assert relative_flatness(INPUTS, shifted, logits) == pytest.approx(0.0822170, abs=1e-7)


@pytest.mark.parametrize("mode", ["fixed", "joint", "free"])
def test_shift_keeps_outputs_is_idempotent_and_depends_on_the_row_span(mode: str) -> None:
    weight, bias, inputs = normal(4, 9), normal(4, seed=1), normal(5, 9, seed=2)
    shift = shift_linear(weight, bias, inputs, mode)
    assert torch.allclose(F.linear(inputs, shift.weight, shift.bias), F.linear(inputs, weight, bias), atol=1e-12)
    again = shift_linear(shift.weight, shift.bias, inputs, mode)
    assert torch.allclose(again.weight, shift.weight, atol=1e-12)
    assert torch.allclose(again.bias, shift.bias, atol=1e-12)
    moved = (weight - shift.weight).square().sum()
    fixed = shift_linear(weight, bias, inputs)
    if mode == "joint":
        moved = moved + (bias - shift.bias).square().sum()
        before, after = (
            weight.square().sum() + bias.square().sum(),
            shift.weight.square().sum() + shift.bias.square().sum(),
        )
        assert after < fixed.weight.square().sum() + bias.square().sum()
    else:
        before, after = weight.square().sum(), shift.weight.square().sum()
    assert before.item() == pytest.approx((after + moved).item(), abs=1e-12)
    if mode == "free":
        assert shift.weight_norm_after < fixed.weight_norm_after
    # only the span of the rows counts, not their order or repetition, and in mode fixed not their scale
    other = torch.cat([inputs.flip(0), inputs])
    assert torch.allclose(shift_linear(weight, bias, other, mode).weight, shift.weight, atol=1e-12)
    if mode == "fixed":
        scaled = inputs * torch.tensor([1.0, -3, 0.1, 20, 5], dtype=torch.float64)[:, None]
        assert torch.allclose(shift_linear(weight, bias, scaled).weight, shift.weight, atol=1e-12)
    streamed = shift_from_gram(weight, bias, mode=mode, **gram_of(inputs))
    assert torch.allclose(streamed.weight, shift.weight, atol=1e-10)
    assert torch.allclose(streamed.bias, shift.bias, atol=1e-10)
    assert streamed.rank == shift.rank


@pytest.mark.parametrize("mode", ["fixed", "joint", "free"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shift_of_full_rank_returns_the_weights_to_the_bit(mode: str, dtype: torch.dtype) -> None:
    weight, bias, inputs = normal(3, 6, dtype=dtype), normal(3, seed=1, dtype=dtype), normal(20, 6, seed=2, dtype=dtype)
    for shift in (
        shift_linear(weight, bias, inputs, mode),
        shift_from_gram(weight, bias, mode=mode, **gram_of(inputs.double())),
    ):
        assert shift.status == "identity"
        assert torch.equal(shift.weight, weight)
        assert torch.equal(shift.bias, bias)
        assert shift.weight_norm_before == shift.weight_norm_after


@pytest.mark.parametrize("n", [5, 40])
def test_rank_follows_rtol(n: int) -> None:
    inputs = with_singular_values(n, 8, [1, 1e-2, 1e-4, 1e-6, 1e-8])
    weight = normal(3, 8, seed=7)
    ranks, errors = [], []
    for rtol in (1e-9, 1e-7, 1e-5, 1e-3, 1e-1):
        shift = shift_linear(weight, None, inputs, rtol=rtol)
        expected, rank = svd_shift(weight, inputs, rtol)
        assert shift.rank == rank
        assert torch.allclose(shift.weight, expected, atol=1e-6 if rtol == 1e-9 else 1e-8)
        ranks.append(shift.rank)
        errors.append((inputs @ (weight - shift.weight).T).abs().max().item())
    assert ranks == [5, 4, 3, 2, 1]
    assert all(error < bound for error, bound in zip(errors, (1e-14, 1e-7, 1e-5, 1e-3, 1e-1), strict=True))


@pytest.mark.parametrize(("n", "d"), [(30, 70), (70, 30), (40, 40)])
@pytest.mark.parametrize("rank", [12, None])
def test_shift_agrees_with_the_svd(n: int, d: int, rank: int | None) -> None:
    inputs = normal(n, d) if rank is None else normal(n, rank) @ normal(rank, d, seed=1)
    weight = normal(5, d, seed=3)
    expected, found = svd_shift(weight, inputs, max(n, d) * 2.2e-16)
    shift = shift_linear(weight, None, inputs)
    assert shift.rank == found
    assert torch.allclose(shift.weight, expected, atol=1e-10)


@pytest.mark.parametrize(("dtype", "rank"), [(torch.bfloat16, 2), (torch.float16, 2), (torch.float32, 3)])
def test_default_rtol_depends_on_the_dtype(dtype: torch.dtype, rank: int) -> None:
    inputs = with_singular_values(4, 6, [10, 5, 1e-2]).to(dtype)
    # rounding to half precision adds directions, which must not count
    if dtype != torch.float32:
        assert torch.linalg.matrix_rank(inputs.double()) > rank
    shift = shift_linear(normal(2, 6, dtype=dtype), None, inputs)
    assert (shift.rank, shift.weight.dtype) == (rank, dtype)


def test_equal_rows_have_rank_0_in_free_mode() -> None:
    inputs = normal(1, 6).expand(7, 6) * 3
    shift = shift_linear(normal(2, 6, seed=1), normal(2, seed=2), inputs, "free")
    assert shift.rank == 0
    assert not shift.weight.any()
    streamed = shift_from_gram(normal(2, 6, seed=1), normal(2, seed=2), mode="free", **gram_of(inputs))
    assert streamed.rank == 0


CONVOLUTIONS = {
    "plain": ({}, (2, 3, 5, 5), 6),
    "padded": ({"padding": 1}, (1, 3, 4, 4), 6),
    "same": ({"padding": "same", "kernel_size": (2, 3), "dilation": (1, 2)}, (1, 3, 3, 4), 6),
    "strided": ({"stride": (2, 1), "dilation": (1, 2), "padding": (1, 2)}, (1, 3, 5, 5), 6),
    "grouped": ({"groups": 2, "padding": 1}, (1, 4, 4, 4), 6),
    "depthwise": ({"groups": 3, "padding": 1}, (1, 3, 2, 3), 6),
    "reflect": ({"padding": 1, "padding_mode": "reflect"}, (1, 3, 4, 4), 6),
    "circular": ({"padding": (0, 1), "padding_mode": "circular"}, (1, 3, 4, 4), 6),
    "replicate": ({"padding": "same", "padding_mode": "replicate"}, (1, 3, 4, 4), 6),
}


@pytest.mark.parametrize("mode", ["fixed", "joint", "free"])
@pytest.mark.parametrize("case", CONVOLUTIONS)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_convolution_shift_keeps_outputs_and_is_idempotent(case: str, mode: str) -> None:
    options, shape, out = CONVOLUTIONS[case]
    conv = nn.Conv2d(shape[1], out, **{"kernel_size": 3, **options}).double()
    inputs = normal(*shape)
    arguments = [conv.stride, conv.padding, conv.dilation, conv.groups]
    shift = shift_conv2d(conv.weight, conv.bias, inputs, *arguments, mode, padding_mode=conv.padding_mode)
    assert shift.status == "shifted"
    assert shift.weight_norm_after < 0.999 * shift.weight_norm_before
    assert isinstance(shift.rank, list) == (conv.groups > 1)
    expected = conv(inputs)
    with torch.no_grad():
        conv.weight.copy_(shift.weight)
        conv.bias.copy_(shift.bias)
    assert torch.allclose(conv(inputs), expected, atol=1e-12)
    again = shift_conv2d(conv.weight, conv.bias, inputs, *arguments, mode, padding_mode=conv.padding_mode)
    assert torch.allclose(again.weight, shift.weight, atol=1e-12)


def test_pointwise_convolution_shifts_as_linear_and_groups_separately() -> None:
    inputs = normal(3, 6, 4, 4)
    inputs[:, 5] = inputs[:, 0] + inputs[:, 1]
    weight = normal(4, 6, 1, 1, seed=1)
    shift = shift_conv2d(weight, None, inputs, 1, 0, 1, 1)
    assert (shift.rank, shift.status, shift.bias) == (5, "shifted", None)
    full = shift_conv2d(normal(4, 2, 3, 3), None, normal(2, 2, 8, 8), 1, 1, 1, 1)
    assert (full.rank, full.status) == (18, "identity")
    flat = shift_linear(weight.flatten(1), None, inputs.movedim(1, -1))
    assert torch.allclose(flat.weight, shift.weight.flatten(1), atol=1e-13)
    streamed = shift_from_gram(weight, None, **gram_of(inputs.movedim(1, -1).flatten(0, 2)))
    assert torch.allclose(streamed.weight, shift.weight, atol=1e-10)
    # a group of full rank stays to the bit beside one that is shifted
    inputs = torch.cat([normal(1, 2, 4, 4), normal(1, 1, 4, 4, seed=5).expand(1, 2, 4, 4)], 1)
    weight = normal(4, 2, 1, 1, seed=1)
    shift = shift_conv2d(weight, None, inputs, groups=2)
    assert (shift.rank, shift.status) == ([2, 1], "shifted")
    assert torch.equal(shift.weight[:2], weight[:2])


def test_hessian_of_the_shifted_layer_stays_and_of_the_layer_before_falls() -> None:
    """The block of the shifted layer stays; that of the layer before it gets flatter where all its ReLUs are active.

    Its trace is a sum over images of ``|input|^2 tr(S W P W')``, with ``S`` from the probabilities, which stay, and
    ``P`` the projector on the 4 features of 12 units; about 0.44 of it is left here.
    """
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 3)).double()
    nn.init.constant_(net[2].bias, 3.0)
    image, target = normal(4, 3, seed=5), torch.tensor([0, 1, 2, 1])
    assert (net[:4](image) > 0.5).all()

    def traces() -> tuple[float, dict[str, float]]:
        parameters = {name: p.detach().clone() for name, p in net.named_parameters()}

        def loss(values: dict[str, Tensor]) -> Tensor:
            return F.cross_entropy(functional_call(net, values, image), target)

        blocks = hessian(loss)(parameters)
        found = {
            name: blocks[name][name].reshape(p.numel(), p.numel()).trace().item() for name, p in parameters.items()
        }
        return loss(parameters).item(), found

    loss, before = traces()
    shift = shift_linear(net[4].weight, net[4].bias, net[:4](image))
    with torch.no_grad():
        net[4].weight.copy_(shift.weight)
    loss_after, after = traces()
    assert loss_after == pytest.approx(loss, abs=1e-12)
    assert shift.rank == 4
    for name in ("2.weight", "2.bias"):
        assert after[name] < 0.9 * before[name]
    assert all(after[name] == pytest.approx(before[name], abs=1e-12) for name in ("4.weight", "4.bias"))


def test_shift_ignores_autocast_and_returns_a_new_tensor_without_gradient() -> None:
    weight, inputs = nn.Parameter(normal(2, 6, dtype=torch.float32)), normal(3, 6, seed=1, dtype=torch.float32)
    plain = shift_linear(weight, None, inputs.requires_grad_())
    with torch.autocast("cpu", torch.bfloat16):
        cast = shift_linear(weight, None, inputs)
    assert torch.equal(plain.weight, cast.weight)
    assert not plain.weight.requires_grad
    assert plain.weight.data_ptr() != weight.data_ptr()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": torch.zeros(2, 3)}, "inputs are all 0"),
        ({"inputs": torch.zeros(0, 3)}, "inputs hold no row"),
        ({"inputs": torch.full((2, 3), torch.nan)}, "inputs must be finite"),
        ({"inputs": torch.ones(2, 4)}, r"inputs must be \[n, d\]"),
        ({"weight": torch.full((2, 3), torch.inf)}, "weight must be finite"),
        ({"bias": torch.ones(3)}, r"bias must be \[2\]"),
        ({"bias": None, "mode": "joint"}, "mode 'joint' changes the bias"),
        ({"mode": "none"}, "mode must be one of"),
        ({"rtol": 2.0}, "rtol must be"),
    ],
)
def test_wrong_arguments_of_shift_linear_raise(change: dict, message: str) -> None:
    given = {"weight": torch.ones(2, 3), "bias": torch.ones(2), "inputs": torch.ones(2, 3)}
    with pytest.raises(ValueError, match=f"^{message}"):
        shift_linear(**{**given, **change})


def test_wrong_arguments_of_gram_and_convolution_shift_raise() -> None:
    with pytest.raises(ValueError, match=r"^gram must be float64"):
        shift_from_gram(torch.ones(2, 3), None, torch.ones(3, 3))
    with pytest.raises(ValueError, match=r"^mode 'free' needs the sum"):
        shift_from_gram(torch.ones(2, 3), torch.ones(2), torch.eye(3).double(), "free")
    with pytest.raises(ValueError, match=r"^inputs must be \[N, C, H, W\]"):
        shift_conv2d(torch.ones(2, 3, 1, 1), None, torch.ones(1, 4, 2, 2))
    with pytest.raises(ValueError, match=r"^inputs are all 0"):
        shift_conv2d(
            torch.ones(2, 1, 1, 1), None, torch.ones(1, 2, 2, 2) * torch.tensor([1.0, 0])[:, None, None], groups=2
        )


def test_small_directions_count_among_many_float32_rows():
    generator = torch.Generator().manual_seed(0)
    sizes = torch.logspace(0, -3, 8)
    inputs = torch.randn(20_000, 8, generator=generator) * sizes  # eight directions of very different size
    weight = torch.randn(3, 8, generator=generator)
    assert shift_linear(weight, None, inputs).status == "identity"
