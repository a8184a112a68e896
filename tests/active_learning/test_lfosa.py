"""LfOSA: the detector's loss and the posteriors with worked numbers; the query; training, two processes."""

import copy

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_kd.active_learning import LfOSA, known_posterior, run_rounds, select_query, temperature_cross_entropy
from lightning_kd.active_learning.lfosa import _log_odds
from lightning_kd.core.feature_hooks import find_classifier
from lightning_kd.core.mixture import Mixtures, fit_mixture
from lightning_kd.data import DigitsDataModule
from lightning_kd.pool import PoolRecord, PoolView
from tests.active_learning.runs import pool_data, starter, trainer_of
from tests.two_processes import on_two_ranks

LOGITS = torch.tensor([[2.0, 0, -1, 1], [0.5, 0, 3, 2]], dtype=torch.float64)
TARGET = torch.tensor([0, 3])


# -- the loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("temperatures", "rows", "mean"),
    [
        ((1.0, 1.0), (0.440190, 1.405299), 0.922745),
        ((0.5, 0.5), (0.145078, 2.135013), 1.140046),
        ((0.5, 2.0), (0.145078, 1.249606), 0.697342),
    ],
)
def test_losses_equal_worked_numbers(temperatures, rows, mean):
    assert temperature_cross_entropy(LOGITS, TARGET, 3, *temperatures).item() == pytest.approx(mean, abs=1e-6)
    for k in range(2):
        one = temperature_cross_entropy(LOGITS[k : k + 1], TARGET[k : k + 1], 3, *temperatures)
        assert one.item() == pytest.approx(rows[k], abs=1e-6)


def gradient_of(logits, *temperatures):
    logits = logits.clone().requires_grad_()
    temperature_cross_entropy(logits, TARGET, 3, *temperatures).backward()
    return logits.grad


def test_gradient_equals_worked_numbers_and_sums_to_zero():
    expected = torch.tensor([0.005887, 0.002166, 0.873704, -0.881757], dtype=torch.float64)
    torch.testing.assert_close(gradient_of(LOGITS, 0.5, 0.5)[1], expected, atol=1e-6, rtol=0)
    for temperatures in ((0.3, 0.7), (2.0, 1.0)):
        gradient = gradient_of(LOGITS, *temperatures)
        torch.testing.assert_close(gradient.sum(1), torch.zeros(2, dtype=torch.float64), atol=1e-12, rtol=0)


def test_loss_stays_equal_when_logits_and_temperatures_scale_together():
    loss = temperature_cross_entropy(LOGITS, TARGET, 3, 0.3, 0.9)
    torch.testing.assert_close(temperature_cross_entropy(7 * LOGITS, TARGET, 3, 2.1, 6.3), loss)
    torch.testing.assert_close(gradient_of(7 * LOGITS, 2.1, 6.3), gradient_of(LOGITS, 0.3, 0.9) / 7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    large = (torch.tensor([[4e4, 0.0, -4e4], [0.0, 3e4, 1.0]])).to(dtype)  # twice that is inf in float16
    loss = temperature_cross_entropy(large, torch.tensor([1, 2]), 2, 0.5, 0.5)
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = temperature_cross_entropy(LOGITS.float(), TARGET, 3)
    torch.testing.assert_close(inside, temperature_cross_entropy(LOGITS.float(), TARGET, 3))


def test_wrong_arguments_of_the_loss_raise():
    for name, temperatures in (("known_temperature", (0, 1)), ("unknown_temperature", (1, -1))):
        with pytest.raises(ValueError, match=f"^{name} must be above 0"):
            temperature_cross_entropy(LOGITS, TARGET, 3, *temperatures)
    with pytest.raises(ValueError, match=r"^logits must be \[N, num_known \+ 1\] = \[N, 5\], got \[2, 4\]"):
        temperature_cross_entropy(LOGITS, TARGET, 4)
    for target in ([0, 4], [-1, 3]):
        with pytest.raises(ValueError, match=r"^target must be between 0 and 3"):
            temperature_cross_entropy(LOGITS, torch.tensor(target), 3)


# -- the posterior ---------------------------------------------------------------------------------------------------


def detector_logits(activation, predicted, num_known):
    """Logits whose largest value is ``activation``, at the place ``predicted``; the others are 3 to 5 below."""
    generator = torch.Generator().manual_seed(0)
    below = 3 + 2 * torch.rand(len(activation), num_known + 1, generator=generator, dtype=torch.float64)
    logits = activation[:, None].double() - below
    return logits.scatter(1, predicted[:, None], activation[:, None].double())


def pool_logits(count=400, num_known=4, seed=0):
    """Logits with high and low activations in every known class and some predicted unknown; which are high; classes."""
    generator = torch.Generator().manual_seed(seed)
    high = torch.rand(count, generator=generator) < 0.4
    predicted = torch.randint(0, num_known + 1, (count,), generator=generator)
    activation = torch.where(high, 10.0, 4.0) + 0.5 * torch.randn(count, generator=generator)
    return detector_logits(activation + predicted, predicted, num_known), high & (predicted < num_known), predicted


def view(count, num_known=4, start=0):
    empty = np.empty(0, np.int64)
    return PoolView(np.arange(count) * 2 + start, empty, empty, empty, num_known)


def task_of(num_known=4, **kwargs):
    return LfOSA("mlp_8", num_known, input_shape=(1, 8, 8), **kwargs)


def selected(logits, budget, num_known=4, pool=None, **kwargs):
    pool = pool or view(len(logits), num_known)
    query = task_of(num_known, **kwargs).select({"detector_logits": logits}, pool, budget, np.random.default_rng(0))
    return ((query.index - pool.unlabelled[0]) // 2), query.score


def test_posterior_is_that_of_one_mixture_for_each_class():
    logits, _, predicted = pool_logits()
    posterior = known_posterior(logits, 4)
    assert posterior.dtype == torch.float64
    assert (posterior[predicted == 4] == 0).all()
    for k in range(4):
        value = logits[predicted == k, k]
        expected = fit_mixture(value).posterior(value)[:, 1]
        torch.testing.assert_close(posterior[predicted == k], expected, atol=1e-9, rtol=1e-9)


def test_posterior_separates_low_and_high_activations_in_each_class():
    value = torch.tensor([0, 0.2, 0.3, 0.5, 4, 4.4, 4.5, 5.1])
    logits = torch.full((16, 3), -9.0)
    logits[:8, 0], logits[8:, 1] = value, value + 1
    posterior = known_posterior(logits, 2)
    assert posterior.round().tolist() == [0, 0, 0, 0, 1, 1, 1, 1] * 2
    torch.testing.assert_close(posterior[:8], posterior[8:])


EXAMPLE = Mixtures(
    *(torch.tensor([v], dtype=torch.float64) for v in ([4.0, 9.0], [0.25, 9.0], [0.5, 0.5])),
    torch.ones(1, dtype=torch.int64),
    torch.ones(1, dtype=torch.bool),
)


def test_posterior_of_unequal_variances_falls_then_rises_unless_monotone():
    value = torch.tensor([-2.0, 2, 3, 4, 5, 6, 9], dtype=torch.float64)
    group = torch.zeros(7, dtype=torch.int64)
    official = _log_odds(EXAMPLE, value, group, monotone=False).sigmoid()
    assert official.tolist() == pytest.approx([1.000, 0.970, 0.143, 0.040, 0.336, 0.997, 1.000], abs=5e-4)
    rising = _log_odds(EXAMPLE, value, group, monotone=True).sigmoid()
    assert rising.tolist() == pytest.approx([0, 0, 0, 0.040, 0.336, 0.997, 1.000], abs=5e-4)


def test_monotone_changes_only_values_below_the_smaller_mean():
    value = torch.linspace(-30, 40, 701, dtype=torch.float64)
    group = torch.zeros(701, dtype=torch.int64)
    for variance in ([0.25, 9.0], [9.0, 0.25], [1.0, 1.0]):
        mixtures = EXAMPLE._replace(variance=torch.tensor([variance], dtype=torch.float64))
        log_odds = _log_odds(mixtures, value, group, monotone=True)
        plain = _log_odds(mixtures, value, group, monotone=False)
        assert torch.equal(log_odds, plain.where(value >= 4, -torch.inf))


def test_posterior_of_a_single_sample_in_its_class():
    """Two classes with a mixture, high means 10 and 12, and one of a single sample."""
    value = torch.tensor([4.0, 4.2, 9.9, 10.1, 5.0, 5.2, 11.9, 12.1])
    predicted = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    for alone, expected in ((11.5, 1.0), (10.5, 0.5)):
        logits = detector_logits(
            torch.cat([value, torch.tensor([alone])]), torch.cat([predicted, torch.tensor([2])]), 3
        )
        assert known_posterior(logits, 3)[-1] == expected
        assert 8 in selected(logits, 9, 3)[0]  # never left out
    lonely = detector_logits(torch.tensor([3.0, 7.0]), torch.tensor([0, 1]), 3)
    assert known_posterior(lonely, 3).tolist() == [0.5, 0.5]
    assert selected(lonely, 2, 3)[0].tolist() == [1, 0]  # a tie, so by the activation


def test_posterior_of_equal_logits_all_unknown_and_empty_pools():
    assert known_posterior(torch.zeros(5, 3), 2).tolist() == [0.5] * 5  # argmax takes the first class
    for monotone in (False, True):
        assert known_posterior(torch.full((5, 3), -0.1), 2, monotone=monotone).tolist() == [0.5] * 5
    assert known_posterior(torch.tensor([[0.0, 1, 2]]).repeat(3, 1), 2).tolist() == [0.0] * 3
    assert known_posterior(torch.zeros(0, 3), 2).shape == (0,)


def test_wrong_arguments_of_the_posterior_raise():
    with pytest.raises(ValueError, match=r"^logits must be \[N, num_known \+ 1\] = \[N, 5\], got \[2, 4\]"):
        known_posterior(LOGITS, 4)
    with pytest.raises(ValueError, match=r"^logits must be finite"):
        known_posterior(LOGITS / 0, 3)


# -- the query -------------------------------------------------------------------------------------------------------


def test_high_activations_are_queried_whatever_the_pool_order():
    logits, high, _ = pool_logits()
    budget = int(high.sum())
    index, score = selected(logits, budget)
    assert sorted(index) == high.nonzero().flatten().tolist()
    assert (np.diff(score) <= 0).all()
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(1))
    again, _ = selected(logits[order], budget // 2)
    assert set(order[again].tolist()) == set(index[: budget // 2].tolist())


def test_query_does_not_depend_on_batch_size_or_batch_order(monkeypatch):
    """The same logits, gathered by ``select_query`` from batches of other sizes and in another order."""
    queries = []
    for batch_size, backwards in ((1000, False), (7, False), (64, True)):
        data = pool_data(eval_batch_size=batch_size)
        data.setup()
        logits, high, _ = pool_logits(len(data.train_target))
        loader = data.loader("train", data.unlabelled_indices, batch_size=batch_size)
        batches = [torch.as_tensor(batch.index) for batch in loader]
        assert len(batches) == -(-len(data.unlabelled_indices) // batch_size)
        outputs = [
            {"index": index, "prediction": logits[index, :4].argmax(1), "detector_logits": logits[index]}
            for index in (reversed(batches) if backwards else batches)
        ]
        trainer = trainer_of()
        monkeypatch.setattr(trainer, "predict", lambda *args, outputs=outputs, **kwargs: outputs)
        queries.append(select_query(trainer, task_of(), data)[0])
    assert high[torch.from_numpy(queries[0].index)].all()
    for query in queries[1:]:
        assert query.index.tolist() == queries[0].index.tolist()
        assert query.score.tolist() == queries[0].score.tolist()


def test_ties_of_the_posterior_go_by_log_odds_then_activation_then_index():
    value = torch.tensor([0.0, 0.2, 0.1, 0.3, 60.0, 60.5, 61.0, 60.5])
    logits = detector_logits(value, torch.zeros(8, dtype=torch.int64), 2)
    posterior = known_posterior(logits, 2)
    assert (posterior[4:] == 1).all()
    assert selected(logits, 4, 2)[0].tolist() == [6, 5, 7, 4]
    both = torch.cat([logits, logits[:, [1, 0, 2]]])  # the same in another class: by index
    assert selected(both, 4, 2)[0].tolist() == [6, 14, 5, 7]


def test_log_odds_come_before_the_activation():
    """High samples of both classes have posterior 1; the second's are larger but less far from its low ones."""
    value = torch.tensor([0.0, 0.2, 0.1, 0.3, 60.0, 60.5]), torch.tensor([100.0, 100.2, 100.1, 100.3, 130.0, 130.5])
    predicted = torch.tensor([0, 1]).repeat_interleave(6)
    logits = detector_logits(torch.cat(value), predicted, 2)
    assert (known_posterior(logits, 2)[[4, 5, 10, 11]] == 1).all()
    log_odds = []
    for part in value:
        low, high = fit_mixture(part).log_joint(part)[4:].T
        log_odds += (high - low).tolist()
    assert log_odds == sorted(log_odds[:2]) + sorted(log_odds[2:])
    assert min(log_odds[:2]) > max(log_odds[2:])
    assert selected(logits, 4, 2)[0].tolist() == [5, 4, 11, 10]


def test_predicted_unknown_samples_come_last_by_the_margin_of_unknown():
    logits = torch.tensor([[1.0, 0, 4], [3, 0, 1], [0, 2.5, 3], [2, 0, 1], [0, 9, 11.0], [0, 1, 0]])
    index, score = selected(logits, 6, 2)
    assert sorted(index[:3]) == [1, 3, 5]
    assert index[3:].tolist() == [2, 4, 0]
    assert score[3:].tolist() == [0, 0, 0]
    assert set(selected(logits, 3, 2)[0]) == {1, 3, 5}
    assert selected(logits[[0, 2, 4]], 2, 2)[0].tolist() == [1, 2]  # all are predicted unknown


def test_a_sample_below_a_monotone_cut_comes_before_those_predicted_unknown():
    value = torch.cat([torch.linspace(3.9, 4.1, 50), torch.linspace(6, 14, 50), torch.tensor([1.0])])
    logits = detector_logits(value - 10, torch.zeros(101, dtype=torch.int64), 2)
    logits = torch.cat([logits, torch.tensor([[0, 0, 0.1]], dtype=torch.float64)])
    assert known_posterior(logits, 2)[100] > 0.99
    assert known_posterior(logits, 2, monotone=True)[100] == 0
    assert selected(logits, 102, 2, monotone=True)[0][-1] == 101


def test_posterior_uses_raw_logits_not_softmax():
    logits, _, predicted = pool_logits()
    shifted = logits.clone()
    row = int((predicted == 1).nonzero()[0])
    shifted[row] += 4
    assert known_posterior(shifted, 4)[row] != known_posterior(logits, 4)[row]
    torch.testing.assert_close(shifted[row].softmax(0), logits[row].softmax(0))


def test_temperatures_do_not_change_the_pool_scores():
    torch.manual_seed(0)
    task = task_of()
    other = task_of(known_temperature=2.0, unknown_temperature=5.0)
    other.load_state_dict(task.state_dict())
    image = torch.rand(6, 1, 8, 8)
    torch.testing.assert_close(
        task.pool_scores(image, None)[1]["detector_logits"], other.pool_scores(image, None)[1]["detector_logits"]
    )
    torch.testing.assert_close(task.pool_scores(image, None)[1]["detector_logits"], task.detector(image))


# -- the task --------------------------------------------------------------------------------------------------------


def fitted(trainer=None, data=None, ckpt_path=None, **kwargs):
    L.seed_everything(0, verbose=False)
    task = task_of(**kwargs)
    trainer = trainer or trainer_of()
    trainer.fit(task, datamodule=data or pool_data(), ckpt_path=ckpt_path)
    return task, trainer


def with_answers(folder, **kwargs):
    """Data of a pool with the answers to a query of 30 samples."""
    data = pool_data(**kwargs)
    data.setup()
    record = PoolRecord(folder / "pool.json")
    index = np.random.default_rng(0).permutation(data.unlabelled_indices)[:30]
    record.add_query(index, np.zeros(30), ["0"] * 30)
    names = [*data.class_names, "unknown"]
    record.add_answers({int(i): names[k] for i, k in zip(index, data.oracle(index), strict=True)}, "oracle")
    data.set_record(record)
    assert len(data.unknown_indices) > 5
    return data


def train_by_a_plain_loop(network, data, indices, stream, loss, epochs=2):
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    loader = data.loader("train", indices, shuffle=True, augment=True, batch_size=data.batch_size, stream=stream)
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        for batch in loader:
            optimizer.zero_grad()
            loss(network(batch.image), batch.target).backward()
            optimizer.step()


def test_a_fit_equals_two_networks_trained_apart(tmp_path):
    data = with_answers(tmp_path)
    task, _ = fitted(data=data, known_temperature=0.4)
    L.seed_everything(0, verbose=False)
    start = task_of()
    known = data.known_indices
    answered = np.sort(np.concatenate([known, data.unknown_indices]))
    train_by_a_plain_loop(
        start.detector, data, answered, "detector", lambda z, y: temperature_cross_entropy(z, y, 4, 0.4, 0.5)
    )
    train_by_a_plain_loop(start.network, data, known, "classifier", F.cross_entropy)
    for mine, theirs in zip(task.state_dict().values(), start.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_fit_logs_exports_and_scores_both_networks(tmp_path):
    data = with_answers(tmp_path)
    task, trainer = fitted(data=data)
    logged = trainer.callback_metrics
    assert {"train/loss", "train/acc", "train/detector_loss", "train/detector_acc"} <= logged.keys()
    assert {name: find_classifier(net)[1].out_features for name, net in task.exports().items()} == {
        "network": 4,
        "detector": 5,
    }
    assert task.main_network is task.network
    out = trainer.predict(task, datamodule=data)[0]
    torch.testing.assert_close(
        out["probabilities"], task.network(next(iter(data.predict_dataloader())).image).softmax(1)
    )
    assert out["detector_logits"].shape[1] == 5


@pytest.mark.filterwarnings("ignore:You requested to overfit")
def test_fit_without_unknown_answers_and_with_few_batches():
    _, trainer = fitted(trainer_of(limit_train_batches=2))
    assert {"train/detector_loss", "train/loss"} <= trainer.callback_metrics.keys()
    fitted(trainer_of(fast_dev_run=2))
    fitted(trainer_of(overfit_batches=2, precision="bf16-mixed"))


def test_resume_to_the_bit(tmp_path):
    whole, _ = fitted(trainer_of(max_epochs=3))
    _, trainer = fitted(trainer_of(max_epochs=1))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    again, trainer = fitted(trainer_of(max_epochs=3), ckpt_path=tmp_path / "one.ckpt")
    assert again.loaded_progress[1] > 0
    assert all(map(torch.equal, whole.state_dict().values(), again.state_dict().values()))
    loaded = LfOSA.load_from_checkpoint(tmp_path / "one.ckpt")
    assert loaded.num_classes == 4


@pytest.mark.parametrize("as_module", [False, True])
def test_bottleneck_layer_comes_before_the_classifier_of_both_networks(as_module):
    network = task_of().network if as_module else "mlp_8"
    task = LfOSA(network, 4, input_shape=(1, 8, 8), bottleneck_dim=2)
    for net, outputs in ((task.network, 4), (task.detector, 5)):
        assert [layer.weight.shape for layer in net.fc] == [(2, 8), (outputs, 2)]
        assert net(torch.rand(3, 1, 8, 8)).shape == (3, outputs)
        assert find_classifier(net)[1].in_features == 2


def test_named_classifier_is_the_layer_that_is_replaced():
    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden, self.top, self.unused = nn.Linear(64, 8), nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, image):
            return self.top(self.hidden(image.flatten(1)).relu())

    task = LfOSA(TwoHeads(), 4, input_shape=(1, 8, 8), classifier="top")
    assert task.detector_logits(torch.rand(2, 1, 8, 8)).shape == (2, 5)
    task = LfOSA(TwoHeads(), 4, input_shape=(1, 8, 8), bottleneck_dim=2, classifier="top")
    for net, outputs in ((task.network, 4), (task.detector, 5)):
        assert [layer.weight.shape for layer in net.top] == [(2, 8), (outputs, 2)]
        assert net.unused.weight.shape == (4, 8)
    with pytest.raises(ValueError, match="classifier path 'flop' is nothing in MLP"):
        task_of(classifier="flop")


def test_a_module_is_copied_for_the_detector():
    network = task_of().network
    before = copy.deepcopy(network.state_dict())
    task = LfOSA(network, 4, input_shape=(1, 8, 8))
    assert task.network is network
    assert task.detector(torch.rand(2, 1, 8, 8)).shape == (2, 5)
    assert torch.equal(task.detector.hidden[0].weight, before["hidden.0.weight"])


def test_wrong_arguments_raise():
    for name in ("known_temperature", "unknown_temperature", "variance_floor"):
        with pytest.raises(ValueError, match=f"^{name} must be above 0, got 0"):
            task_of(**{name: 0})
    for value, wanted in ((0, "at least 1"), (2.5, "a whole number"), (float("nan"), "a whole number")):
        with pytest.raises(ValueError, match=f"^max_iter must be {wanted}, got {value}"):
            task_of(max_iter=value)
    for value in (-1, float("nan")):
        with pytest.raises(ValueError, match=f"^tol must be at least 0, got {value}"):
            task_of(tol=value)
    with pytest.raises(ValueError, match=r"^bottleneck_dim must be at least 1, got 0"):
        task_of(bottleneck_dim=0)
    with pytest.raises(ValueError, match=r"LfOSA needs a pool, got DigitsDataModule: wrap your data module"):
        trainer_of().fit(LfOSA("mlp_8", 10, input_shape=(1, 8, 8)), datamodule=DigitsDataModule(fake=True))
    task = task_of()
    task.detector = task.network
    with pytest.raises(ValueError, match=r"^MLP gives \[2, 4\], expected \[B, 5\]"):
        task.pool_scores(torch.rand(2, 1, 8, 8), None)


def test_five_rounds_query_150_different_samples(tmp_path):
    rows = run_rounds(
        starter(LfOSA, data={"rounds": 5}, network="mlp_16", num_classes=4, input_shape=(1, 8, 8)), tmp_path, say=str
    )
    record = PoolRecord.load(tmp_path / "pool.json")
    assert len({row["index"] for row in record.queries}) == 150
    assert rows[-1]["labels"] == 150


# -- several processes -----------------------------------------------------------------------------------------------


def _two_ranks(folder):
    data = with_answers(folder, batch_size=16)
    settings = {"strategy": "ddp", "devices": 2, "num_sanity_val_steps": 0}
    task, _ = fitted(trainer_of(precision="64-true", **settings), data=data)
    L.seed_everything(0, verbose=False)
    normalised = LfOSA("cnn_tiny", 4, input_shape=(1, 8, 8))
    trainer_of(**settings).fit(normalised, datamodule=data)
    return [{name: value.tolist() for name, value in t.state_dict().items()} for t in (task, normalised)]


def test_two_processes_train_as_one(tmp_path):
    (first, normalised), (second, also_normalised) = on_two_ranks(_two_ranks, tmp_path)
    assert first == second
    assert normalised == also_normalised  # running statistics too
    task, _ = fitted(trainer_of(precision="64-true"), data=with_answers(tmp_path))
    for name, value in task.state_dict().items():
        torch.testing.assert_close(torch.tensor(first[name], dtype=value.dtype), value, atol=1e-9, rtol=1e-9)
