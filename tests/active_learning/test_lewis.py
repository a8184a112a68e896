"""Lewis weights, draws and regressions against worked numbers, their definitions and plain computations."""

import math

import numpy as np
import pytest
import torch

from lightning_kd.active_learning import (
    draw_until,
    lewis_certificate,
    lewis_weights,
    lp_regression,
    max_lewis_weights,
)
from lightning_kd.active_learning import whitened_rows as whitened_rows_module
from lightning_kd.core.seeding import torch_generator

POWERS = [0.5, 1, 1.5, 2, 3, 4, 6, 8]


def rows(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch_generator(seed, "rows"))


def close(found, expected, atol=1e-9):
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=torch.float64), rtol=0, atol=atol)


# -- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("p", "expected"),
    [(1, (0.2, 0.4, 0.4)), (1.5, (0.150221, 0.424889, 0.424889)), (3, (1 / 17, 8 / 17, 8 / 17))],
)
def test_weights_of_one_column_are_proportional_to_powers_of_its_values(p, expected):
    found = lewis_weights(torch.tensor([[1.0], [2.0], [2.0]]), p)
    assert found.dtype == torch.float64
    close(found, expected, 1e-6)


@pytest.mark.parametrize("p", POWERS)
def test_orthogonal_groups_of_rows_have_separate_weights(p):
    features = torch.tensor([[1.0, 0], [2, 0], [0, 3], [0, 3]])
    close(lewis_weights(features, p), [1 / (1 + 2**p), 2**p / (1 + 2**p), 0.5, 0.5])


@pytest.mark.parametrize("p", POWERS)
def test_weights_satisfy_their_definition(p):
    features = rows(12, 3)
    weight = lewis_weights(features, p)
    gram = features.T @ torch.diag(weight ** (1 - 2 / p)) @ features
    close(((features @ gram.inverse()) * features).sum(1) ** (p / 2), weight.tolist())
    assert float(weight.sum()) == pytest.approx(3, abs=1e-8)
    assert 0 < float(weight.min()) <= float(weight.max()) <= 1


def test_weights_for_p_2_are_leverage_scores():
    features = rows(30, 5)
    close(lewis_weights(features), torch.linalg.qr(features)[0].square().sum(1).tolist())


@pytest.mark.parametrize("p", [1, 2, 6])
def test_weights_ignore_column_mixing_row_order_signs_and_extra_columns(p):
    features = rows(12, 3)
    weight = lewis_weights(features, p).tolist()
    order = torch.randperm(12, generator=torch_generator(0, "order"))
    sign = torch.sign(rows(12, 1, seed=1))
    close(lewis_weights(features @ rows(3, 3, seed=2), p), weight)
    close(lewis_weights(features[order], p), [weight[i] for i in order])
    close(lewis_weights(features * sign, p), weight)
    close(lewis_weights(features * torch.tensor([1e-150, 1e150, 1], dtype=torch.float64), p), weight)
    close(lewis_weights(torch.cat([features, features[:, :2]], 1), p), weight)  # the rank stays the same
    close(lewis_weights(torch.cat([features, torch.zeros(12, 1)], 1), p), weight)


@pytest.mark.parametrize("p", [1, 1.5, 2, 4])
def test_row_split_in_two_splits_its_weight(p):
    features = rows(12, 3)
    weight = lewis_weights(features, p).tolist()
    half = features[:1] * 2 ** (-1 / p)
    found = lewis_weights(torch.cat([half, half, features[1:]]), p)
    close(found, [weight[0] / 2, weight[0] / 2, *weight[1:]])


@pytest.mark.parametrize("p", [0.5, 1, 2, 6])
def test_rows_of_zeros_have_weight_zero(p):
    features = torch.cat([torch.zeros(1, 3), rows(12, 3), torch.zeros(2, 3)])
    found = lewis_weights(features, p)
    assert found[[0, 13, 14]].tolist() == [0, 0, 0]
    close(found[1:13], lewis_weights(features[1:13], p).tolist())
    assert lewis_weights(torch.zeros(4, 3), p).tolist() == [0] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_of_nearly_collinear_features_sum_to_the_true_rank(dtype):
    """Rounding to the dtype of the features hides their rank of 6."""
    low = rows(400, 6) @ rows(6, 20, seed=1)
    found = lewis_weights(low.to(dtype))
    assert float(found.sum()) == pytest.approx(6, abs=1e-8)
    close(found, lewis_weights(rows(400, 6)).tolist(), 1e-4 if dtype == torch.float32 else 1e-9)


def test_badly_conditioned_features_stay_leverage_scores():
    features = rows(200, 8) @ torch.diag(10.0 ** -torch.arange(8, dtype=torch.float64)) @ rows(8, 8, seed=1)
    exact = lewis_weights(rows(200, 8))
    assert float((lewis_weights(features) - exact).abs().max()) < 1e-7
    assert float(lewis_weights(features).sum()) == pytest.approx(8, abs=1e-10)


@pytest.mark.parametrize("p", [1, 2, 6])
def test_weights_do_not_depend_on_the_block_size(p, monkeypatch):
    features = rows(50, 3)
    whole = lewis_weights(features, p).tolist()
    monkeypatch.setattr(whitened_rows_module, "BLOCK", 7)
    close(lewis_weights(features, p), whole)


def test_numpy_integers_are_accepted():
    features = np.array([[1], [2], [2]])
    close(lewis_weights(features), [1 / 9, 4 / 9, 4 / 9])


def test_linearly_independent_rows_warn_and_have_weight_one():
    with pytest.warns(UserWarning, match="3 rows of features are linearly independent"):
        assert lewis_weights(rows(3, 5)).tolist() == pytest.approx([1, 1, 1])


def test_too_few_iterations_warn():
    with pytest.warns(UserWarning, match="max_iterations=2 passes the weights for p=8"):
        lewis_weights(rows(12, 3), 8, max_iterations=2)


@pytest.mark.parametrize(("p", "rate"), [(1, 1 / 3), (3, 1 / 5), (6, 1 / 2), (10, 2 / 3)])
def test_iteration_converges_at_the_stated_rate(p, rate):
    """The classical iteration diverges beyond p = 4, one with steps of 2 / p at p = 1."""
    features, exact = rows(12, 3), lewis_weights(rows(12, 3), p, tolerance=1e-13)
    off = []
    for passes in (6, 10):
        with pytest.warns(UserWarning, match="max_iterations"):
            off.append(float((lewis_weights(features, p, max_iterations=passes) - exact).abs().max()))
    assert off[1] < 1.1 * rate**4 * off[0]


@pytest.mark.parametrize(("p", "power"), [(1, 1), (2, 1), (3, 3), (3.5, 7)])
def test_the_certificate_bounds_the_error(p, power):
    features = rows(12, 3)
    exact = lewis_weights(features, p, tolerance=1e-13)
    rough = exact * torch.exp(0.1 * rows(12, seed=1))
    residual, factor = lewis_certificate(features, rough, p)
    assert factor == pytest.approx(math.exp(power * residual))
    assert 1 < float((rough / exact).log().abs().max().exp()) <= factor
    assert lewis_certificate(features, exact, p).residual < 1e-11


def test_certificate_of_zero_weights_is_infinite_and_a_wrong_shape_raises():
    assert lewis_certificate(rows(12, 3), torch.zeros(12)).factor == math.inf
    with pytest.raises(ValueError, match=r"weights must be \[12\], one for each row of features, got \[3\]"):
        lewis_certificate(rows(12, 3), torch.ones(3))


@pytest.mark.parametrize(
    ("features", "arguments", "message"),
    [
        (torch.ones(3), {}, r"features must be \[n, d\] real numbers, got \[3\]"),
        (torch.ones(0, 3), {}, r"features must be \[n, d\] real numbers, got \[0, 3\]: give one row for each sample"),
        (torch.ones(3, 0), {}, r"features must be \[n, d\] real numbers, got \[3, 0\]"),
        (torch.tensor([[1.0], [math.nan]]), {}, "features must be finite"),
        (torch.tensor([[1.0], [math.inf]]), {"p": 1}, "features must be finite"),
        (torch.ones(3, 1), {"p": 0}, "p must be above 0, got 0"),
        (torch.ones(3, 1), {"p": -1.0}, "p must be above 0, got -1.0"),
        (torch.ones(3, 1), {"tolerance": 0.0}, "tolerance must be above 0"),
        (torch.ones(3, 1), {"rank_tolerance": 2.0}, "rank_tolerance must be above 0 and below 1"),
    ],
)
def test_weights_of_wrong_arguments_raise(features, arguments, message):
    with pytest.raises(ValueError, match=message):
        lewis_weights(features, **arguments)


# -- several representations -----------------------------------------------------------------------------------------


def test_max_weights_of_two_representations_equal_worked_numbers():
    largest = max_lewis_weights([torch.tensor([[1.0], [2.0], [2.0]]), torch.tensor([[2.0], [1.0], [1.0]])])
    close(largest, [2 / 3, 4 / 9, 4 / 9])
    assert float(largest.sum()) == pytest.approx(14 / 9)
    close(largest / largest.sum(), [3 / 7, 2 / 7, 2 / 7])


def test_more_representations_raise_the_sum_up_to_the_ranks():
    several = [rows(40, 3, seed=k) for k in range(4)]
    sums = [float(max_lewis_weights(several[: k + 1], 3).sum()) for k in range(4)]
    assert sums == sorted(sums)
    assert all(total <= 3 * (k + 1) + 1e-9 for k, total in enumerate(sums))
    close(max_lewis_weights([several[0]] * 3), lewis_weights(several[0]).tolist())


@pytest.mark.parametrize(
    ("features", "message"),
    [([], "at least one matrix"), ([torch.ones(3, 1), torch.ones(4, 1)], r"same order, got \[3, 4\] rows")],
)
def test_no_representation_or_unequal_row_counts_raise(features, message):
    with pytest.raises(ValueError, match=message):
        max_lewis_weights(features)


# -- draws -----------------------------------------------------------------------------------------------------------

P = [3 / 7, 2 / 7, 2 / 7]


def test_draws_from_given_uniform_numbers_equal_worked_ones():
    drawn = draw_until(P, 2, [0.9, 0.72, 0.99, 0.1, 0.5])
    assert drawn.draws.tolist() == [2, 2, 2, 0]
    assert drawn.distinct.tolist() == [0, 2]
    assert drawn.multiplicity.tolist() == [1, 3]
    close(drawn.loss_weight, [1 / (4 * 3 / 7), 3 / (4 * 2 / 7)])
    assert drawn.order.tolist() == [1, 0]  # row 2 was drawn first
    draws, distinct, loss_weight, *_ = drawn  # in this order
    assert (draws, distinct, loss_weight) == (drawn.draws, drawn.distinct, drawn.loss_weight)
    assert [value.dtype for value in drawn] == [torch.int64, torch.int64, torch.float64, torch.int64]


def test_uniform_on_an_edge_draws_the_next_row_and_never_a_zero_row():
    assert draw_until([0.0, 0.5, 0.0, 0.5, 0.0], 2, [0.0, 0.5]).draws.tolist() == [1, 3]
    assert draw_until([0.5, 0.5, 0.0], 1, [np.nextafter(1, 0)]).draws.tolist() == [1]


def test_draws_normalize_weights_that_do_not_sum_to_one():
    drawn = draw_until([6, 4, 4], 2, [0.9, 0.1])
    close(drawn.loss_weight, [1 / (2 * 3 / 7), 1 / (2 * 2 / 7)])


@pytest.mark.parametrize("make", [np.random.default_rng, lambda seed: torch.Generator().manual_seed(seed)])
def test_draws_repeat_with_the_seed_of_the_generator(make):
    chance = rows(500).square()
    one, same, other = (draw_until(chance, 100, make(seed)) for seed in (3, 3, 4))
    assert one.draws.tolist() == same.draws.tolist() != other.draws.tolist()
    assert len(set(one.draws.tolist())) == 100 == len(one.distinct)
    assert len(set(one.draws[:-1].tolist())) == 99  # cut right after the last new one


def test_draws_in_blocks_continue_one_stream_of_numbers():
    """The last row is so unlikely that many blocks pass before it is drawn."""
    chance = np.array([1.0, 1.0, 1e-3])
    drawn = draw_until(chance, 3, np.random.default_rng(5))
    uniform = np.random.default_rng(5).random(len(drawn.draws))
    assert len(drawn.draws) > 200
    assert drawn.draws.tolist() == draw_until(chance, 3, uniform).draws.tolist()


def test_sum_weighted_by_the_draws_estimates_the_sum_over_all_rows():
    """Nearly, since drawing stops at a new row."""
    chance, value = rows(30).square() + 0.1, rows(30, seed=1).abs()
    generator = np.random.default_rng(0)
    found = [draw_until(chance, 10, generator) for _ in range(2000)]
    number = np.mean([float(one.loss_weight.sum()) for one in found])
    assert number == pytest.approx(30, rel=0.1)  # of rows, not of draws
    estimate = np.mean([float(one.loss_weight @ value[one.distinct]) for one in found])
    assert estimate == pytest.approx(float(value.sum()), rel=0.1)


@pytest.mark.parametrize(
    ("probability", "budget", "uniforms", "message"),
    [
        (P, 0, [0.5], "budget must be at least 1 and at most 3, got 0"),
        (P, 4, [0.5], "budget must be at least 1 and at most 3, got 4"),
        ([0.0, 1.0, 0.0], 2, [0.5], "at most 1, got 2"),
        ([-1.0, 2.0], 1, [0.5], "0 or more and not all 0"),
        ([math.nan, 2.0], 1, [0.5], "finite"),
        ([0.0, 0.0], 1, [0.5], "not all 0"),
        ([[0.5, 0.5]], 1, [0.5], r"must be \[n\]"),
        (P, 2, [0.1, 0.2], "2 numbers, which is too few for budget=2"),
        (P, 2, [1.0], "below 1"),
        (P, 2, [-0.1], "at least 0"),
    ],
)
def test_draws_of_wrong_arguments_raise(probability, budget, uniforms, message):
    with pytest.raises(ValueError, match=message):
        draw_until(probability, budget, uniforms)


def test_rows_that_are_never_drawn_raise(monkeypatch):
    monkeypatch.setattr("lightning_kd.active_learning.lewis.MOST_DRAWS", 1000)
    with pytest.raises(ValueError, match="budget=2 different rows were not reached in"):
        draw_until([1.0, 1e-300], 2, np.random.default_rng(0))


# -- regression ------------------------------------------------------------------------------------------------------


def test_regression_for_p_2_equals_weighted_least_squares():
    features, target, weight = rows(12, 3), rows(12, 2, seed=1), rows(12, seed=2).square()
    gram = features.T @ torch.diag(weight) @ features
    expected = gram.inverse() @ features.T @ torch.diag(weight) @ target
    close(lp_regression(features, target, weight), expected)
    close(lp_regression(features, target[:, 0], weight), expected[:, 0])


def test_regression_for_p_1_gives_a_weighted_median():
    target = torch.tensor([5.0, 1, 2, 100])
    close(lp_regression(torch.ones(4, 1), target, [1, 1, 1.5, 1], 1), [2.0], 1e-7)
    close(lp_regression(torch.ones(3, 1), torch.tensor([1.0, 2, 100]), None, 1), [2.0], 1e-7)


@pytest.mark.parametrize("p", [1.2, 1.5, 3, 6])
def test_regression_loss_is_lower_than_at_nearby_solutions(p):
    features, target, weight = rows(40, 4), rows(40, seed=1), rows(40, seed=2).square()
    theta = lp_regression(features, target, weight, p)
    near = theta + torch.cat([size * rows(200, 4, seed=3) for size in (1e-1, 1e-3, 1e-5)])
    found, others = (weight @ (features @ t.T - target[:, None]).abs().pow(p) for t in (theta[None], near))
    assert float(others.min()) > float(found) * (1 + 1e-14)


def test_weight_of_two_equals_a_repeated_row():
    features, target = rows(10, 2), rows(10, seed=1)
    twice = lp_regression(torch.cat([features, features[:1]]), torch.cat([target, target[:1]]), None, 3)
    close(lp_regression(features, target, [2] + [1] * 9, 3), twice.tolist())


def test_rank_deficient_features_give_the_shortest_solution():
    features, target = rows(12, 2), rows(12, seed=1)
    found = lp_regression(torch.cat([features, features[:, :1]], 1), target)
    alone = lp_regression(features, target)
    close(found, [alone[0] / 2, alone[1], alone[0] / 2])
    close(lp_regression(features, features @ torch.tensor([2.0, 3], dtype=torch.float64), None, 1), [2.0, 3])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(3, 1), torch.ones(4)), r"got \[3, 1\], \[4\], \[3\]"),
        ((torch.ones(0, 2), torch.ones(0)), r"got \[0, 2\], \[0\], \[0\]"),
        ((torch.ones(3, 1), torch.ones(3), torch.ones(2)), r"\[2\]"),
        ((torch.ones(3, 1), torch.ones(3), -torch.ones(3)), "0 or more"),
        ((torch.ones(3, 1), torch.full((3,), math.nan)), "finite"),
        ((torch.ones(3, 1), torch.ones(3), None, 0.5), "p must be at least 1, got 0.5"),
    ],
)
def test_regression_of_wrong_arguments_raises(arguments, message):
    with pytest.raises(ValueError, match=message):
        lp_regression(*arguments)
