"""k-center greedy against a plain loop, BADGE against explicit gradient embeddings."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lightning_kd.active_learning import diverse_selection
from lightning_kd.active_learning.diverse_selection import badge_picks, badge_select, k_center_greedy, k_center_picks
from lightning_kd.core.seeding import numpy_generator, torch_generator


def normal(*shape, stream="rows", dtype=torch.float64):
    return torch.randn(*shape, generator=torch_generator(0, stream), dtype=torch.float64).to(dtype)


def plain_k_center(pool, labelled, budget):
    """k-center greedy with one pass over all float64 differences for each pick."""
    pool, labelled = pool.double().numpy(), labelled.double().numpy()
    near = np.full(len(pool), np.inf)
    for row in labelled:
        near = np.minimum(near, ((pool - row) ** 2).sum(1))
    picks = []
    for _ in range(budget):
        best = int(near.argmax())
        picks.append(best)
        near = np.minimum(near, ((pool - pool[best]) ** 2).sum(1))
        near[picks] = -np.inf
    return picks


def family(name, count, width):
    """Feature rows of the named kind."""
    if name == "random":
        return normal(count, width)
    if name == "clusters":
        centres = normal(20, width, stream="centres") * 5
        return centres[torch.arange(count) % 20] + 0.1 * normal(count, width)
    if name == "low-rank relu":
        return (normal(count, 4) @ normal(4, width, stream="mix")).relu()
    if name == "duplicates":  # whole numbers: many ties, and every row several times
        return normal(count // 4, 3).round().repeat(4, 1)[torch.randperm(count, generator=torch_generator(0, "p"))]
    if name == "far away":
        return normal(count, width) + 1000.3
    assert name == "outlier"
    rows = normal(count, width)
    rows[3] *= 1e4
    return rows


FAMILIES = ["random", "clusters", "low-rank relu", "duplicates", "far away", "outlier"]


@pytest.mark.parametrize("block", [4, 32, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FAMILIES)
def test_k_center_picks_what_the_plain_loop_picks(name, dtype, block, monkeypatch):
    monkeypatch.setattr(diverse_selection, "BLOCK", block)
    monkeypatch.setattr(diverse_selection, "CHUNK", 500)  # several chunks in a pass
    rows = family(name, 240, 16).to(dtype)
    pool, labelled = rows[:220], rows[220:]
    picks = k_center_picks(pool, labelled, 120)
    assert picks.row.tolist() == plain_k_center(pool, labelled, 120)
    assert bool((picks.score.diff() <= 1e-6).all())  # radii never grow
    assert picks.row.dtype == torch.int64
    assert picks.score.dtype == torch.float64


@pytest.mark.parametrize("name", FAMILIES)
def test_k_center_picks_every_row_once(name):
    picks = k_center_greedy(
        family(name, 200, 16).float(), torch.empty(0, 16)[:, : 3 if name == "duplicates" else 16], 200
    )
    assert picks[0] == 0  # nothing labelled: the first row
    assert sorted(picks.tolist()) == list(range(200))


def test_k_center_picks_and_scores_computed_by_hand():
    pool = torch.tensor([[0.0], [1.0], [10.0]])
    picks = k_center_picks(pool, torch.tensor([[0.0]]), 2)
    assert picks.row.tolist() == [2, 1]
    assert picks.score.tolist() == [10.0, 1.0]
    assert k_center_greedy(pool, torch.tensor([[0.0]]), 3).tolist() == [2, 1, 0]
    assert k_center_picks(pool, torch.empty(0, 1), 2).score.tolist() == [torch.inf, 10.0]


def test_k_center_breaks_ties_by_row():
    assert k_center_greedy(torch.tensor([[-1.0], [1.0], [0.5]]), torch.zeros(1, 1), 2).tolist() == [0, 1]
    same = torch.full((50, 3), 0.1)
    assert k_center_greedy(same, same[:1], 10).tolist() == list(range(10))


def test_k_center_takes_a_copy_of_a_labelled_row_last():
    pool = normal(30, 5, dtype=torch.float32)
    assert k_center_greedy(pool, torch.cat([normal(3, 5, stream="other").float(), pool[7:8]]), 30)[-1] == 7


def test_k_center_orders_rows_that_float32_products_cannot_separate():
    """Distances to a far centre that differ in the eighth digit."""
    pool = torch.stack([torch.full((20,), 3000.0), normal(20, stream="y", dtype=torch.float32)], 1)
    labelled = torch.zeros(1, 2)
    assert k_center_greedy(pool, labelled, 20).tolist() == plain_k_center(pool, labelled, 20)


def close_family(name):
    """Float32 rows whose distances are small against their norms, as trained features are within a class."""
    if name.startswith("clusters"):
        spread, width = float(name.split()[1]), 64
        return (normal(20, width, stream="centres").repeat(20, 1) + spread * normal(400, width)).float()
    if name == "offset":
        offset = 100 * torch.rand(512, generator=torch_generator(0, "offset"), dtype=torch.float64)
        return (offset + 1e-3 * normal(400, 512)).float()
    assert name == "near copies"
    return (normal(300, 16, stream="centres").repeat(4, 1) + 2e-4 * normal(1200, 16)).float()


@pytest.mark.parametrize("block", [16, 1024])
@pytest.mark.parametrize("name", ["clusters 1e-5", "clusters 1e-4", "clusters 1e-3", "offset", "near copies"])
def test_k_center_picks_what_float64_picks_where_float32_products_are_inexact(name, block, monkeypatch):
    """By products alone a wrong centre may seem the nearest, so differences must decide."""
    monkeypatch.setattr(diverse_selection, "BLOCK", block)
    rows = close_family(name)
    pool, labelled, budget = (rows[3:], rows[:3], 120) if name != "near copies" else (rows[290:], rows[:290], 200)
    assert k_center_greedy(pool, labelled, budget).tolist() == plain_k_center(pool, labelled, budget)


@pytest.mark.parametrize("block", [16, 1024])
def test_k_center_on_a_grid_of_tenths_has_the_radii_of_float64(block, monkeypatch):
    """Distances are nearly equal: which row comes first depends on the last bit, its distance does not."""
    monkeypatch.setattr(diverse_selection, "BLOCK", block)
    tenths = torch.arange(8, dtype=torch.float32) * 0.1
    grid = torch.cartesian_prod(tenths, tenths, tenths)[torch.randperm(512, generator=torch_generator(0, "p"))]
    pool, labelled = grid[10:], grid[:10]
    picks = k_center_picks(pool, labelled, 300)
    assert bool((picks.score.diff() <= 1e-9).all())
    near = torch.cdist(pool.double(), labelled.double(), compute_mode="donot_use_mm_for_euclid_dist").amin(1)
    for row, score in zip(picks.row.tolist(), picks.score.tolist(), strict=True):
        assert score == pytest.approx(near[row].item(), abs=1e-9)
        assert score == pytest.approx(near.max().item(), abs=1e-9)
        near = torch.minimum(near, (pool.double() - pool[row].double()).norm(dim=1))


@pytest.mark.parametrize("budget", [0, 5, 9])
def test_number_of_picks_is_the_budget_up_to_the_pool_size(budget):
    pool = normal(5, 3)
    probabilities = normal(5, 4, stream="p").softmax(1)
    assert len(k_center_greedy(pool, pool[:1], budget)) == min(budget, 5)
    picks = badge_select(probabilities, pool, budget, numpy_generator(0, "badge"))
    assert len(set(picks.tolist())) == min(budget, 5)


def test_empty_pool_gives_no_picks():
    assert len(k_center_greedy(torch.empty(0, 3), torch.ones(2, 3), 4)) == 0
    assert len(badge_select(torch.empty(0, 2), torch.empty(0, 3), 4, numpy_generator(0, "badge"))) == 0


@pytest.mark.parametrize(
    ("pool", "labelled", "budget", "message"),
    [
        (torch.ones(4), torch.ones(1, 1), 1, r"pool must be \[N, D\], got \[4\]"),
        (torch.ones(4, 2), torch.ones(1, 3), 1, "labelled has 3 features a row, expected 2"),
        (torch.full((4, 2), torch.nan), torch.ones(1, 2), 1, "pool must be finite"),
        (torch.ones(4, 2), torch.full((1, 2), torch.inf), 1, "labelled must be finite"),
        (torch.ones(4, 2), torch.ones(1, 2), -1, "budget must be at least 0, got -1"),
    ],
)
def test_k_center_of_wrong_inputs_raises(pool, labelled, budget, message):
    with pytest.raises(ValueError, match=message):
        k_center_greedy(pool, labelled, budget)


# -- BADGE -----------------------------------------------------------------------------------------------------------


def gradients(probabilities, feature):
    """Explicit gradient embeddings ``[N, K * D]``."""
    onehot = F.one_hot(probabilities.argmax(1), probabilities.shape[1])
    return torch.einsum("nk,nd->nkd", onehot - probabilities, feature).flatten(1)


def example(count=40, classes=5, width=7):
    return (3 * normal(count, classes, stream="z")).softmax(1), normal(count, width, stream="h")


def test_badge_embedding_is_minus_the_gradient_of_the_classifier():
    feature = normal(6, 7, stream="h")
    classifier = torch.nn.Linear(7, 5, dtype=torch.float64)
    probabilities = classifier(feature).softmax(1).detach()
    for i in range(6):
        classifier.zero_grad()
        F.cross_entropy(classifier(feature[i : i + 1]), probabilities[i : i + 1].argmax(1)).backward()
        embedding = gradients(probabilities, feature)[i]
        torch.testing.assert_close(embedding, -classifier.weight.grad.flatten())
        residual = diverse_selection._residual(probabilities)
        torch.testing.assert_close(embedding.norm(), residual[i].norm() * feature[i].norm())


def test_badge_distances_equal_those_of_explicit_embeddings():
    probabilities, feature = example()
    explicit = gradients(probabilities, feature)
    residual = diverse_selection._residual(probabilities)
    norm = residual.square().sum(1) * feature.square().sum(1)
    for row in range(len(feature)):
        distance = diverse_selection._gradient_distance(residual, feature, norm, row)
        torch.testing.assert_close(distance, (explicit - explicit[row]).square().sum(1), rtol=0, atol=1e-10)
        assert distance[row] == 0
    assert bool((diverse_selection._gradient_distance(residual, feature, norm, 0) >= 0).all())


def test_badge_draws_what_k_means_seeding_on_explicit_embeddings_draws():
    probabilities, feature = example()
    explicit = gradients(probabilities, feature)
    generator = numpy_generator(3, "badge")
    picks = [int(explicit.norm(dim=1).argmax())]
    scores = [float(explicit.square().sum(1).max())]
    while len(picks) < 15:
        near = torch.cdist(explicit, explicit[picks], compute_mode="donot_use_mm_for_euclid_dist").amin(1).square()
        total = near.cumsum(0)
        picks.append(int((total > generator.random() * total[-1]).int().argmax()))
        scores.append(float(near[picks[-1]]))
    found = badge_picks(probabilities, feature, 15, numpy_generator(3, "badge"))
    assert found.row.tolist() == picks
    torch.testing.assert_close(found.score, torch.tensor(scores, dtype=torch.float64))


def test_badge_draws_in_proportion_to_the_squared_distance():
    probabilities, feature = example(count=6)
    explicit = gradients(probabilities, feature)
    first = int(explicit.norm(dim=1).argmax())
    expected = (explicit - explicit[first]).square().sum(1)
    generator = numpy_generator(0, "many")
    counts = np.bincount([badge_select(probabilities, feature, 2, generator)[1] for _ in range(1000)], minlength=6)
    np.testing.assert_allclose(counts / 1000, expected / expected.sum(), atol=0.06)


@pytest.mark.parametrize("sure", [torch.tensor([1.0, 0, 0, 0, 0]), torch.tensor([40.0, 0, 0, 0, 0]).softmax(0)])
def test_badge_picks_samples_with_certain_predictions_last(sure):
    probabilities, feature = example(count=12)
    probabilities[[2, 5]] = sure.double()
    feature[[2, 5]] *= 100
    for seed in range(20):
        picks = badge_select(probabilities, feature, 12, numpy_generator(seed, "badge")).tolist()
        assert set(picks[-2:]) == {2, 5}
        assert sorted(picks) == list(range(12))


@pytest.mark.parametrize("what", ["copies", "one-hot"])
def test_badge_draws_uniformly_where_all_distances_are_zero(what):
    probabilities, feature = (part[:1].repeat(8, 1).float() for part in example())
    if what == "one-hot":
        probabilities = torch.eye(5)[torch.arange(8) % 5]
    generator = numpy_generator(0, "many")
    seconds = [badge_select(probabilities, feature, 3, generator).tolist() for _ in range(400)]
    assert {picks[0] for picks in seconds} == {0}
    assert all(len(set(picks)) == 3 for picks in seconds)
    counts = np.bincount([picks[1] for picks in seconds], minlength=8)
    np.testing.assert_allclose(counts[1:] / 400, 1 / 7, atol=0.07)


def test_badge_on_large_float32_features_picks_every_row_once():
    probabilities, feature = example()
    picks = badge_picks(probabilities.float(), (feature + 1e4).float(), 40, numpy_generator(0, "badge"))
    assert sorted(picks.row.tolist()) == list(range(40))
    assert bool((picks.score >= 0).all())


def test_badge_of_wrong_inputs_raises():
    probabilities, feature = example()
    with pytest.raises(ValueError, match="feature must have a row for each of the 40 probabilities, got 39"):
        badge_select(probabilities, feature[1:], 2, numpy_generator(0, "badge"))
    with pytest.raises(ValueError, match="probabilities must be finite"):
        badge_select(probabilities / 0, feature, 2, numpy_generator(0, "badge"))
