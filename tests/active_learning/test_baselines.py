"""The closed-set query strategies against worked numbers, and ``PoolClassifier`` in rounds on a pool."""

import math

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lightning_kd
from lightning_kd.active_learning import (
    BUAL,
    KCenter,
    PoolClassifier,
    Strategy,
    k_center_greedy,
    least_confidence,
    predictive_entropy,
    probability_margin,
    run_rounds,
    select_query,
)
from lightning_kd.active_learning.baselines import STRATEGIES
from lightning_kd.active_learning.diverse_selection import badge_picks
from lightning_kd.core.seeding import numpy_generator, torch_generator
from lightning_kd.data.described_samples import DescribedSamples
from lightning_kd.pool import PoolRecord, PoolView, Query
from tests.active_learning.runs import pool_data, starter, trainer_of
from tests.two_processes import on_two_ranks

MEASURES = [least_confidence, probability_margin, predictive_entropy]


# -- measures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [2, 3, 10])
def test_measures_of_uniform_and_one_hot_probabilities(k, dtype):
    rows = torch.stack([torch.full((k,), 1 / k, dtype=dtype), torch.eye(k, dtype=dtype)[k - 1]])
    expected = [(1 - 1 / k, 0), (0, 1), (math.log(k), 0)]
    for measure, pair in zip(MEASURES, expected, strict=True):
        assert measure(rows).dtype == dtype
        assert measure(rows).tolist() == pytest.approx(pair, abs=1e-6)


@pytest.mark.parametrize(
    ("row", "expected"), [((0.5, 0.3, 0.2), (0.5, 0.2, 1.029653)), ((0.45, 0.45, 0.10), (0.55, 0.0, 0.948915))]
)
def test_measures_by_worked_numbers(row, expected):
    row = torch.tensor([row], dtype=torch.float64)
    assert [measure(row).item() for measure in MEASURES] == pytest.approx(expected, abs=1e-6)


def test_half_precision_is_computed_in_float32():
    row = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float16)
    assert all(measure(row).dtype == torch.float32 for measure in MEASURES)


@pytest.mark.parametrize("measure", MEASURES)
def test_probabilities_of_another_shape_raise(measure):
    with pytest.raises(ValueError, match=r"probabilities must be \[N, K\], got \[3\]"):
        measure(torch.ones(3))


def test_margin_of_one_class_raises():
    with pytest.raises(ValueError, match="at least 2 classes for a margin, got 1"):
        probability_margin(torch.ones(3, 1))


# -- strategies ------------------------------------------------------------------------------------------------------


def view(count, labelled=None):
    """A pool of the odd indices; the even ones are labelled."""
    none = np.empty(0, np.int64)
    known = none if labelled is None else np.arange(len(labelled)) * 2
    scores = {} if labelled is None else {"feature": labelled}
    return PoolView(np.arange(count) * 2 + 1, known, known * 0, none, 3, labelled_scores=scores)


def scores_of(rows):
    logits = torch.as_tensor(rows, dtype=torch.float32)
    return {"logits": logits, "probabilities": logits.softmax(1)}


def chosen(name, scores, pool, budget, seed=0):
    query = STRATEGIES[name]().select(scores, pool, budget, numpy_generator(seed, "query"))
    return query.index if isinstance(query, Query) else query


THREE = scores_of(np.log([[0.5, 0.3, 0.2], [0.45, 0.45, 0.10], [0.9, 0.05, 0.05], [0.5, 0.3, 0.2]]))


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("least_confidence", [3, 1, 7, 5]),
        ("margin", [3, 1, 7, 5]),
        ("entropy", [1, 7, 3, 5]),
        ("certainty", [5, 1, 7, 3]),
    ],
)
def test_queries_are_ordered_by_score_and_ties_by_index(name, order):
    assert chosen(name, THREE, view(4), 4).tolist() == order
    assert chosen(name, THREE, view(4), 2).tolist() == order[:2]
    assert chosen(name, {"probabilities": THREE["probabilities"]}, view(4), 4).tolist() == order


@pytest.mark.parametrize("name", ["least_confidence", "margin", "entropy"])
def test_saturated_logits_come_last_with_finite_scores(name):
    query = STRATEGIES[name]().select(
        scores_of([[1000.0, 0, 0], [1.0, 0, 0], [100.0, 0, 0]]), view(3), 3, numpy_generator(0, "query")
    )
    assert query.index[0] == 3
    assert np.isfinite(query.score).all()
    assert query.score[1:].tolist() == pytest.approx([-1.0 if name == "margin" else 0.0] * 2)


def test_certainty_orders_probabilities_that_float32_rounds_to_one():
    assert chosen("certainty", scores_of([[20.0, 0, 0], [25.0, 0, 0]]), view(2), 2).tolist() == [3, 1]


def test_random_query_is_uniform_and_repeats_with_its_seed():
    pool = view(50)
    first = chosen("random", {}, pool, 20)
    assert len(set(first.tolist()) & set(pool.unlabelled.tolist())) == 20
    assert first.tolist() == chosen("random", {}, pool, 20).tolist() != chosen("random", {}, pool, 20, 1).tolist()
    counts = np.bincount([chosen("random", {}, view(5), 1, seed)[0] for seed in range(500)], minlength=10)
    np.testing.assert_allclose(counts[1::2], 100, atol=35)


def features(count, stream):
    return torch.randn(count, 6, generator=torch_generator(0, stream))


def test_k_center_and_badge_query_by_features():
    pool, labelled, feature = view(30, features(4, "l")), features(4, "l"), features(30, "u")
    scores = {**scores_of(features(30, "z")[:, :3]), "feature": feature}
    picks = k_center_greedy(feature, labelled, 10)
    assert chosen("k_center", scores, pool, 10).tolist() == pool.unlabelled[picks].tolist()
    badge = badge_picks(scores["logits"].double().softmax(1), feature, 10, numpy_generator(0, "query"))
    assert chosen("badge", scores, pool, 10).tolist() == pool.unlabelled[badge.row].tolist()
    query = STRATEGIES["badge"]().select(scores, pool, 10, numpy_generator(0, "query"))
    assert query.score.tolist() == badge.score.tolist()


def test_k_center_without_features_of_labelled_samples_raises():
    pool = view(5, features(2, "l"))._replace(labelled_scores={})
    with pytest.raises(ValueError, match=r"pool\.labelled_scores must hold 'feature' for the 2 labelled samples"):
        chosen("k_center", {"feature": features(5, "u")}, pool, 2)
    assert chosen("k_center", {"feature": features(5, "u")}, view(5), 2)[0] == 1  # nothing labelled: the first sample


# Lewis refuses a budget above half of the pool
@pytest.mark.parametrize("name", [name for name in STRATEGIES if name != "lewis"])
@pytest.mark.parametrize("budget", [1, 7, 12])
def test_every_strategy_queries_no_sample_twice(name, budget):
    pool = view(12, features(3, "l"))
    scores = {**scores_of(torch.zeros(12, 3)), "feature": torch.ones(12, 6)}  # all samples alike
    index = chosen(name, scores, pool, budget)
    assert len(index) == len(set(index.tolist()) & set(pool.unlabelled.tolist())) == budget


# -- PoolClassifier --------------------------------------------------------------------------------------------------


def classifier(strategy="entropy", network="mlp_8", **kwargs):
    return PoolClassifier(network, 4, input_shape=(1, 8, 8), strategy=strategy, **kwargs)


def fitted(strategy, **kwargs):
    L.seed_everything(0, verbose=False)
    task, trainer, data = classifier(strategy), trainer_of(), pool_data(**kwargs)
    trainer.fit(task, datamodule=data)
    return task, trainer, data


def test_classifier_trains_like_a_plain_loop_on_the_known_samples_alone():
    task = classifier(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    twin = classifier().network
    twin.load_state_dict(task.network.state_dict())
    data, seen = pool_data(batch_size=64), []

    class Seen(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append(batch)

    trainer = trainer_of(max_epochs=1, callbacks=[Seen()])
    trainer.fit(task, datamodule=data)
    assert sorted(torch.cat([batch.index for batch in seen]).tolist()) == data.known_indices.tolist()
    F.cross_entropy(twin(seen[0].image), seen[0].target).backward()
    for p, trained in zip(twin.parameters(), task.network.parameters(), strict=True):
        torch.testing.assert_close(p - 0.1 * p.grad, trained)
    assert {"train/loss", "train/acc"} <= set(trainer.callback_metrics)


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_named_strategy_queries_the_pool_with_the_scores_it_needs(name):
    task, trainer, data = fitted(name)
    assert task.strategy_name == name
    query, _ = select_query(trainer, task, data)
    assert len(query.index) == 30
    assert np.isin(query.index, data.unlabelled_indices).all()
    outputs = trainer.predict(task, datamodule=data, return_predictions=True)[0]
    batch = next(iter(data.predict_dataloader()))
    with torch.no_grad():
        torch.testing.assert_close(outputs["logits"], task(batch.image))
        torch.testing.assert_close(outputs["probabilities"], task(batch.image).softmax(1))
        if name in ("k_center", "badge", "lewis"):
            torch.testing.assert_close(
                outputs["feature"] @ last_linear(task).weight.T + last_linear(task).bias, task(batch.image)
            )
        else:
            assert set(outputs) == {"index", "prediction", "probabilities", "logits"}


def last_linear(task):
    return [m for m in task.network.modules() if isinstance(m, nn.Linear)][-1]


def test_k_center_in_a_pool_takes_labelled_samples_as_its_first_centers():
    task, trainer, data = fitted("k_center")
    query, _ = select_query(trainer, task, data)
    tapped = {}
    last_linear(task).register_forward_pre_hook(lambda module, args: tapped.update(x=args[0]))

    def of(indices):
        with torch.no_grad():
            task(next(iter(data.loader("train", indices, batch_size=2000))).image)
        return tapped["x"]

    picks = k_center_greedy(of(data.unlabelled_indices), of(data.known_indices), 30)
    assert query.index.tolist() == data.unlabelled_indices[picks].tolist()


def test_repeated_rounds_make_the_same_queries(tmp_path):
    for name in "ab":
        run_rounds(starter(classifier, {"rounds": 1}, strategy="badge"), tmp_path / name, say=str)
    first, second = (PoolRecord.load(tmp_path / name / "pool.json") for name in "ab")
    assert first.queries == second.queries
    assert len(first.queries) == 30
    assert {row["strategy"] for row in first.results} == {"badge"}


def query_of_an_untrained_network(name, devices):
    torch.manual_seed(0)
    task, data = classifier(name), pool_data()
    trainer = trainer_of(devices=devices, strategy="ddp" if devices > 1 else "auto")
    return select_query(trainer, task, data)[0].index.tolist()


@pytest.mark.parametrize("name", ["k_center", "badge"])
def test_two_processes_query_what_one_queries(name):
    assert on_two_ranks(query_of_an_untrained_network, name, 2) == [query_of_an_untrained_network(name, 1)] * 2


class Last(Strategy):
    needs_features = True

    def select(self, scores, pool, budget, generator):
        assert scores["feature"].shape[0] == len(pool.unlabelled)
        return pool.unlabelled[-budget:]


def test_custom_strategy_gets_features_and_makes_the_query():
    task, trainer, data = fitted(Last())
    query, _ = select_query(trainer, task, data)
    assert query.index.tolist() == data.unlabelled_indices[-30:].tolist()
    assert task.strategy_name == "Last"
    assert not task.needs_labelled
    assert classifier(KCenter()).needs_labelled


def test_an_unknown_strategy_is_refused():
    with pytest.raises(ValueError, match=r"strategy must be one of random, least_confidence, .* got 'entropie'"):
        classifier("entropie")


class TwoLinears(nn.Module):
    """Its classifier, ``head``, is not the linear layer defined last."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(5, 4)
        self.body = nn.Linear(64, 5)

    def forward(self, image):
        return self.head(self.body(image.flatten(1)))


def test_feature_is_the_input_of_the_named_classifier():
    task = classifier("badge", TwoLinears(), classifier="head").eval()
    image = torch.randn(3, 1, 8, 8)
    assert torch.equal(task.pool_scores(image, None)[1]["feature"], task.network.body(image.flatten(1)))


def test_weights_file_initializes_the_network(tmp_path):
    torch.save(classifier().network.state_dict(), tmp_path / "network.pt")
    task = classifier(weights=str(tmp_path / "network.pt"))
    expected = torch.load(tmp_path / "network.pt", weights_only=True)
    assert all(torch.equal(value, expected[name]) for name, value in task.network.state_dict().items())


def test_loaded_checkpoint_has_the_strategy_and_weights(tmp_path):
    task, trainer, _ = fitted("k_center")
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = PoolClassifier.load_from_checkpoint(tmp_path / "a.ckpt")
    assert again.strategy_name == "k_center"
    assert torch.equal(last_linear(again).weight, last_linear(task).weight)


def test_classes_and_functions_are_exported_by_the_package():
    for name in ("PoolClassifier", "KCenter", "BADGE", "Random", "k_center_greedy", "badge_select", "least_confidence"):
        assert getattr(lightning_kd, name).__module__.startswith("lightning_kd.active_learning")


@pytest.mark.parametrize("name", ["bual", "lewis"])
def test_new_samples_are_predicted_without_scores_of_the_pool(name, tmp_path):
    settings = {"num_classes": 4, "input_shape": (1, 8, 8)}
    task = BUAL("mlp_8", **settings)  # keeps its pool scores by index, from its last epochs
    if name == "lewis":
        task = PoolClassifier("mlp_8", **settings, strategy="lewis", feature_networks=["of the pool.npy"])
    np.save(tmp_path / "new.npy", np.zeros((3, 8, 8), np.uint8))
    new = DescribedSamples(pool_data().describe(), str(tmp_path / "new.npy"))
    (found,) = trainer_of().predict(task, new)
    assert set(found) == {"index", "prediction", "probabilities"}
    (batch,) = new.predict_dataloader()
    torch.testing.assert_close(found["probabilities"], task.eval().scores_and_probabilities(batch.image)[1])
