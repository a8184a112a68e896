"""One-dimensional Gaussian mixtures."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_kd.core.mixture import Mixture, Mixtures, fit_mixture, fit_mixtures
from lightning_kd.core.univariate_kmeans import kmeans_partition

WORKED = torch.tensor([0, 0.2, 0.3, 0.5, 4, 4.4, 4.5, 5.1])


def two_modes(n: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = 0.08 * torch.randn(n, generator=generator, dtype=torch.float64)
    return x + torch.where(torch.rand(n, generator=generator) < 0.4, 0.3, 0.7)


def squares_within(x: np.ndarray, parts: list[np.ndarray]) -> float:
    return sum(((part - part.mean()) ** 2).sum() for part in parts)


def test_mixture_worked_numbers() -> None:
    mixture = fit_mixture(WORKED)
    assert mixture.mean.tolist() == pytest.approx([0.25, 4.5], abs=1e-6)
    assert mixture.variance.tolist() == pytest.approx([0.0330, 0.1555], abs=1e-6)
    assert mixture.weight.tolist() == pytest.approx([0.5, 0.5], abs=1e-9)
    assert mixture.iterations == 2
    assert all(part.dtype == torch.float64 for part in mixture[:3])
    posterior = mixture.posterior(WORKED)
    assert (posterior.argmax(1) == torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])).all()


@pytest.mark.parametrize("components", [2, 3, 4])
@pytest.mark.parametrize("seed", range(5))
def test_kmeans_start_is_the_best_partition(components: int, seed: int) -> None:
    x = np.random.default_rng(seed).normal(size=12) ** 3 + 1e4  # far from 0, where sums of squares lose digits
    x[3] = x[7]
    ordered = np.sort(x)
    best = min(
        squares_within(ordered, np.split(ordered, cuts))
        for cuts in itertools.combinations(range(1, len(x)), components - 1)
    )
    start = kmeans_partition(torch.from_numpy(x), components)
    assert start.sum(1).tolist() == [1] * len(x)
    parts = [x[start[:, k].numpy() == 1] for k in range(components)]
    assert squares_within(x, parts) == pytest.approx(best, rel=1e-6)
    assert all(low.max() < high.min() for low, high in itertools.pairwise(parts))


def test_kmeans_start_of_many_values_is_nearly_the_best_partition() -> None:
    x = torch.cat([two_modes(6000), two_modes(3000) + 2])
    start = kmeans_partition(x, 3)
    means = ((x @ start) / start.sum(0)).tolist()
    nearest = (x[:, None] - torch.tensor(means)).abs().argmin(1)  # in the best partition every value is at its nearest
    assert (nearest != start.argmax(1)).sum() <= 3 * math.ceil(9000 / 2048)
    assert torch.equal(
        kmeans_partition(torch.tensor([0.0, 1, 2]).repeat(1000), 3), torch.eye(3).double().repeat(1000, 1)
    )


@pytest.mark.parametrize("components", [2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_mixture_equals_scikit_learn_from_the_same_start(components: int, seed: int) -> None:
    mixture_module = pytest.importorskip("sklearn.mixture")
    x = two_modes(1500, seed)
    if components == 3:
        x = torch.cat([x, two_modes(500, seed + 10) + 1])
    start = kmeans_partition(x, components).numpy()
    reference = mixture_module.GaussianMixture(components, max_iter=10, tol=1e-2, reg_covar=5e-4)
    reference._initialize_parameters = lambda X, random_state, **_: reference._initialize(X, start)
    reference.fit(x.numpy()[:, None])
    mixture = fit_mixture(x, components)
    assert mixture.iterations == reference.n_iter_
    order = reference.means_[:, 0].argsort()
    np.testing.assert_allclose(mixture.mean, reference.means_[order, 0], rtol=1e-9)
    np.testing.assert_allclose(mixture.variance, reference.covariances_[order, 0, 0], rtol=1e-9)
    np.testing.assert_allclose(mixture.weight, reference.weights_[order], rtol=1e-9)
    np.testing.assert_allclose(
        mixture.posterior(x), reference.predict_proba(x.numpy()[:, None])[:, order], rtol=1e-9, atol=1e-12
    )
    np.testing.assert_allclose(mixture.log_density(x), reference.score_samples(x.numpy()[:, None]), rtol=1e-9)


def test_order_and_dtype_of_the_values_do_not_matter() -> None:
    x = two_modes(300).float()
    mixture = fit_mixture(x)
    other = fit_mixture(x.flip(0).double().requires_grad_())
    for mine, theirs in zip(mixture[:3], other[:3], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
        assert not theirs.requires_grad
    assert fit_mixture(torch.tensor([1, 2, 9, 10])).mean.tolist() == pytest.approx([1.5, 9.5])


def test_posterior_is_finite_far_away_and_need_not_be_monotone() -> None:
    mixture = Mixture(*(torch.tensor(v, dtype=torch.float64) for v in ([0.2, 0.7], [0.2, 0.01], [0.5, 0.5])), 1)
    posterior = mixture.posterior(torch.tensor([-1e6, 0.7, 3.0, 1e6]))
    assert posterior.isfinite().all()
    torch.testing.assert_close(posterior.sum(1), torch.ones(4, dtype=torch.float64))
    assert (posterior[:, 1] > 0.5).tolist() == [False, True, False, False]


@pytest.mark.parametrize("components", [1, 2, 3])
@pytest.mark.parametrize(
    "values", [[0.3], [0.3] * 7, [0.0, 1.0], [0.0, 1.0, 1.0, 1.0], [0.0] * 99 + [1e9], [1e30, 2.0]]
)
def test_degenerate_values_never_give_nan(values: list[float], components: int) -> None:
    x = torch.tensor(values)
    mixture = fit_mixture(x, components)
    assert all(part.isfinite().all() for part in mixture[:3])
    assert (mixture.variance >= 5e-4).all()
    posterior = mixture.posterior(x)
    assert posterior.isfinite().all()
    torch.testing.assert_close(posterior.sum(1), torch.ones(len(x), dtype=torch.float64))
    if len(set(values)) < components:
        torch.testing.assert_close(posterior, torch.full_like(posterior, 1 / components))
        torch.testing.assert_close(mixture.mean, x.double().mean().expand(components))


def test_single_outlier_gets_its_own_component() -> None:
    x = torch.cat([two_modes(1500), torch.tensor([500.0])])
    x = (x - x.min()) / (x.max() - x.min())
    assert (fit_mixture(x).posterior(x)[:, 1] > 0.5).nonzero().tolist() == [[1500]]


def test_fit_mixture_wrong_arguments_raise() -> None:
    for values in (torch.zeros(0), torch.zeros(2, 2), torch.tensor(1.0)):
        with pytest.raises(ValueError, match=r"^values must be \[N\] with N at least 1, got \["):
            fit_mixture(values)
    with pytest.raises(ValueError, match=r"^values must be finite, got 2 of 3 that are not"):
        fit_mixture(torch.tensor([0.0, math.nan, math.inf]))
    for argument in ("components", "max_iter"):
        with pytest.raises(ValueError, match=rf"^{argument} must be at least 1, got 0"):
            fit_mixture(WORKED, **{argument: 0})
    with pytest.raises(ValueError, match=r"^variance_floor must be above 0, got 0"):
        fit_mixture(WORKED, variance_floor=0)


# -- mixtures of many groups at once ---------------------------------------------------------------------------------


def uneven_groups() -> tuple[Tensor, Tensor]:
    """Groups of all sizes in mixed order: 0 and 5 are empty, 1 has one value, 6 equal ones, 7 ones far away."""
    parts = {1: WORKED[:1], 2: WORKED[3:5], 3: two_modes(700), 4: two_modes(5, 1), 6: torch.full((9,), 0.1)}
    parts |= {7: 1e4 * two_modes(300, 2) - 1e6, 8: WORKED, 9: torch.tensor([0.0, 0.1, 0.2]), 10: two_modes(80, 3)}
    values = torch.cat([part.double() for part in parts.values()])
    group = torch.cat([torch.full((len(part),), k) for k, part in parts.items()])
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(4))
    return values[order], group[order]


@pytest.mark.parametrize("settings", [{}, {"max_iter": 1}, {"tol": 1e-5, "variance_floor": 1e-3, "max_iter": 30}])
def test_groups_fitted_together_equal_single_mixtures(settings: dict[str, float]) -> None:
    values, group = uneven_groups()
    mixtures = fit_mixtures(values, group, 12, **settings)
    assert mixtures.fitted.nonzero().flatten().tolist() == [2, 3, 4, 6, 7, 8, 9, 10]
    log_odds = mixtures.log_odds(values, group)
    for k in range(12):
        if not mixtures.fitted[k]:
            assert all(part[k].isnan().all() for part in mixtures[:3])
            assert mixtures.iterations[k] == 0
            continue
        alone = fit_mixture(values[group == k], 2, **settings)
        assert mixtures.iterations[k] == alone.iterations
        for mine, theirs in zip(mixtures[:3], alone[:3], strict=True):
            torch.testing.assert_close(mine[k], theirs, rtol=1e-9, atol=1e-9)
        posterior = alone.posterior(values[group == k])[:, 1]
        torch.testing.assert_close(log_odds[group == k].sigmoid(), posterior, rtol=1e-7, atol=1e-9)
    if "tol" in settings:
        assert len(mixtures.iterations.unique()) > 3  # groups converge after different numbers of iterations


def test_order_and_dtype_of_grouped_values_do_not_matter() -> None:
    values, group = uneven_groups()
    mixtures, other = fit_mixtures(values, group, 11), fit_mixtures(values.flip(0).requires_grad_(), group.flip(0), 11)
    for mine, theirs in zip(mixtures[:3], other[:3], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9, equal_nan=True)
        assert not theirs.requires_grad
    half = fit_mixtures(torch.tensor([1, 2, 9, 10]).half(), torch.zeros(4, dtype=torch.int64), 1)
    assert half.mean.tolist() == [pytest.approx([1.5, 9.5])]


def test_log_odds_do_not_saturate() -> None:
    row = [torch.tensor([v], dtype=torch.float64) for v in ([0.0, 5.0], [1.0, 1.0], [0.5, 0.5])]
    mixtures = Mixtures(*row, torch.ones(1, dtype=torch.int64), torch.ones(1, dtype=torch.bool))
    log_odds = mixtures.log_odds(torch.tensor([2.5, 50.0, 60.0, -1e6]), torch.zeros(4, dtype=torch.int64))
    assert log_odds.tolist() == pytest.approx([0.0, 237.5, 287.5, -5e6 - 12.5])


@pytest.mark.parametrize("first", torch.linspace(-3, 3, 14).tolist())
def test_tied_splits_give_the_first_in_any_order_and_beside_other_groups(first: float) -> None:
    x = first + torch.tensor([0.0, 0.3, 0.6], dtype=torch.float64)  # both splits are equally good but for rounding
    for order in itertools.permutations(range(3)):
        mixtures = fit_mixtures(torch.cat([x[list(order)], two_modes(50)]), torch.tensor([0] * 3 + [1] * 50), 2)
        assert mixtures.weight[0].tolist() == pytest.approx([1 / 3, 2 / 3], abs=0.05)
        torch.testing.assert_close(fit_mixture(x[list(order)]).mean, mixtures.mean[0])


def test_groups_without_values_are_not_fitted() -> None:
    nothing = fit_mixtures(torch.zeros(0), torch.zeros(0, dtype=torch.int64), 3)
    assert nothing.fitted.tolist() == [False] * 3
    assert nothing.log_odds(torch.zeros(0), torch.zeros(0, dtype=torch.int64)).shape == (0,)


def test_fit_mixtures_wrong_arguments_raise() -> None:
    group = torch.zeros(8, dtype=torch.int64)
    for values, numbers in ((WORKED[:, None], group), (WORKED, group[:7]), (WORKED, group.float())):
        with pytest.raises(ValueError, match=r"^values must be \[N\] and group int64 \[N\], got \["):
            fit_mixtures(values, numbers, 1)
    with pytest.raises(ValueError, match=r"^group must be between 0 and 0, got 0 to 1: raise num_groups"):
        fit_mixtures(WORKED, torch.tensor([0] * 7 + [1]), 1)
    with pytest.raises(ValueError, match=r"^values must be finite, got 8 of 8"):
        fit_mixtures(WORKED / 0 - 1, group, 1)
    with pytest.raises(ValueError, match=r"^max_iter must be at least 1, got 0"):
        fit_mixtures(WORKED, group, 1, max_iter=0)
    with pytest.raises(ValueError, match=r"^variance_floor must be above 0, got 0"):
        fit_mixtures(WORKED, group, 1, variance_floor=0)
