"""BUAL: losses, complementary labels and scores with worked numbers; the two stages, resume, two processes."""

import copy
import math
import warnings

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn

from lightning_kd.active_learning import BUAL, bidirectional_score, complementary_labels
from lightning_kd.active_learning.bual_score import unknown_log_odds
from lightning_kd.core.losses import negative_learning_loss
from lightning_kd.core.schedules import CosineAnnealing
from lightning_kd.core.seeding import numpy_generator
from lightning_kd.data import DigitsDataModule, OpenSetDataModule
from lightning_kd.pool import UNKNOWN, PoolRecord, PoolView
from tests.two_processes import on_two_ranks

NEGATIVE = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.55, 0.45], [0.8, 0.2]], dtype=torch.float64)
POSITIVE = torch.tensor([[0.7, 0.3], [0.95, 0.05], [0.6, 0.4], [0.5, 0.5]], dtype=torch.float64)
UNKNOWN_PROBABILITY = torch.tensor([0.1, 0.4, 0.3, 0.2], dtype=torch.float64)


def generator(seed=0):
    return np.random.default_rng(seed)


# -- functions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "loss", "gradient"),
    [
        (0, 1.856584, (0.843795, -0.616863, -0.226931)),
        (1, 0.121259, (-0.108779, 0.114195, -0.005416)),
        (2, 0.042918, (-0.037002, -0.005008, 0.042010)),
    ],
)
@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_negative_learning_loss_and_gradient_equal_worked_numbers(k, loss, gradient, eps):
    logits = torch.tensor([[2.0, 0.0, -1.0]], dtype=torch.float64, requires_grad=True)
    value = negative_learning_loss(logits, torch.tensor([k]), eps)
    value.backward()
    assert value.item() == pytest.approx(loss, abs=1e-6)
    torch.testing.assert_close(logits.grad[0], torch.tensor(gradient, dtype=torch.float64), atol=1e-6, rtol=0)
    assert logits.grad.sum().item() == pytest.approx(0, abs=1e-12)


def test_only_the_exact_loss_has_a_gradient_at_a_saturated_logit():
    for eps, slope in ((0.0, 1.0), (1e-5, 0.0)):
        logits = torch.tensor([[30.0, 0.0, 0.0]], requires_grad=True)
        negative_learning_loss(logits, torch.tensor([0]), eps).backward()
        assert logits.grad[0, 0].item() == pytest.approx(slope)


def test_complementary_labels_are_uniform_over_the_possible_classes():
    draws = 60_000
    of_class_2 = complementary_labels(torch.full((draws,), 2), 4, generator())
    of_pool = complementary_labels(torch.full((draws,), -1), 4, generator())
    assert of_class_2.dtype == of_pool.dtype == torch.int64
    frequency = [x.bincount(minlength=4) / draws for x in (of_class_2, of_pool)]
    assert frequency[0][2] == 0
    torch.testing.assert_close(frequency[0], torch.tensor([1 / 3, 1 / 3, 0, 1 / 3]), atol=0.01, rtol=0)
    torch.testing.assert_close(frequency[1], torch.full((4,), 0.25), atol=0.01, rtol=0)
    mixed = complementary_labels(torch.tensor([0, 1, 0, 1]), 2, generator())
    assert mixed.tolist() == [1, 0, 1, 0]  # two classes leave no choice
    assert complementary_labels(torch.empty(0, dtype=torch.int64), 3, generator()).shape == (0,)


def test_complementary_labels_of_one_class_or_wrong_targets_raise():
    with pytest.raises(ValueError, match="num_known must be at least 2, got 1"):
        complementary_labels(torch.tensor([0]), 1, generator())
    with pytest.raises(ValueError, match=r"between -1 .no label. and 2, got 0 to 3"):
        complementary_labels(torch.tensor([0, 3]), 3, generator())


def test_score_with_combine_code_equals_worked_numbers():
    score = bidirectional_score(NEGATIVE, POSITIVE, UNKNOWN_PROBABILITY, 0.5)
    expected = torch.tensor([0.222222, 0.142857, 0.037037, 0.238095], dtype=torch.float64)
    torch.testing.assert_close(score, expected, atol=1e-6, rtol=0)
    assert score.argsort().tolist() == [2, 1, 0, 3]
    # from single precision it is computed in double all the same
    assert (
        bidirectional_score(NEGATIVE.float(), POSITIVE.float(), UNKNOWN_PROBABILITY.float(), 0.5).dtype == torch.float64
    )


def test_score_with_combine_paper_equals_worked_numbers():
    score = bidirectional_score(NEGATIVE, POSITIVE, UNKNOWN_PROBABILITY, 0.5, combine="paper")
    torch.testing.assert_close(score, torch.tensor([0.145, 0.175, 0.275, 0.24], dtype=torch.float64))
    assert score.argsort(descending=True).tolist() == [2, 3, 1, 0]


@pytest.mark.parametrize("uncertainty", ["least_confidence", "margin", "entropy"])
def test_score_with_every_uncertainty_equals_a_plain_computation(uncertainty):
    rng = generator()
    negative, positive = (torch.from_numpy(rng.dirichlet(np.ones(4), 9)) for _ in range(2))
    a = torch.from_numpy(rng.random(9))

    def confidence(p):
        first, second = sorted(p.tolist())[:-3:-1]
        plain = {"least_confidence": first, "margin": first - second, "entropy": float((p * p.log()).sum())}
        return plain[uncertainty]

    def scaled(values):
        return [(v - min(values)) / (max(values) - min(values)) for v in values]

    cn, cp, w = (scaled(v) for v in (list(map(confidence, negative)), list(map(confidence, positive)), a.tolist()))
    code = [x * y + 0.3 * (1 - x) * z for x, y, z in zip(w, cn, cp, strict=True)]
    assert bidirectional_score(negative, positive, a, 0.3, uncertainty).tolist() == pytest.approx(code)
    raw = [x * y + 0.3 * (1 - x) * z for x, y, z in zip(a.tolist(), cn, cp, strict=True)]
    ours = bidirectional_score(negative, positive, a, 0.3, uncertainty, normalize_aux=False)
    assert ours.tolist() == pytest.approx(raw)
    top = 0 if uncertainty == "entropy" else 1
    un, up = ([top - confidence(p) for p in probs] for probs in (negative, positive))
    paper = [x * y + 0.3 * (1 - x) * z for x, y, z in zip(a.tolist(), un, up, strict=True)]
    assert bidirectional_score(negative, positive, a, 0.3, uncertainty, "paper").tolist() == pytest.approx(paper)


@pytest.mark.parametrize("uncertainty", ["least_confidence", "margin"])
def test_sum_and_mean_of_snapshots_give_the_same_score(uncertainty):
    a = bidirectional_score(NEGATIVE, POSITIVE, UNKNOWN_PROBABILITY, 0.5, uncertainty)
    b = bidirectional_score(NEGATIVE * 21, POSITIVE, UNKNOWN_PROBABILITY, 0.5, uncertainty)
    torch.testing.assert_close(a, b)


def test_without_an_auxiliary_network_the_negative_head_alone_decides():
    score = bidirectional_score(NEGATIVE, POSITIVE)
    assert score.argsort().tolist() == NEGATIVE.amax(1).argsort().tolist() == [2, 1, 3, 0]
    both = bidirectional_score(NEGATIVE, POSITIVE, balance=1.0)  # precision 1: every answer was a known class
    assert (both - score).tolist() == pytest.approx([4 / 9, 1, 2 / 9, 0])


def test_scores_of_equal_single_empty_and_certain_inputs():
    same = torch.full((3, 2), 0.5)
    assert bidirectional_score(same, same, torch.full((3,), 0.2), 0.7).tolist() == [0, 0, 0]
    assert bidirectional_score(NEGATIVE[:1], POSITIVE[:1], UNKNOWN_PROBABILITY[:1], 0.5).tolist() == [0]
    assert bidirectional_score(NEGATIVE[:0], POSITIVE[:0], UNKNOWN_PROBABILITY[:0]).shape == (0,)
    certain = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    assert bidirectional_score(certain, certain, uncertainty="entropy").tolist() == [1, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((NEGATIVE, POSITIVE[:3]), "negative_probs"),
        ((NEGATIVE, POSITIVE, UNKNOWN_PROBABILITY[:3]), "unknown_probability must be .4., got .3."),
        ((NEGATIVE, POSITIVE, None, 1.5), "balance"),
        ((NEGATIVE, POSITIVE, None, 0.5, "sure"), "uncertainty must be"),
        ((NEGATIVE, POSITIVE, None, 0.5, "margin", "both"), "combine must be"),
        ((NEGATIVE / 0, POSITIVE), "^negative_probs must be finite, got 4 of 4"),
        ((NEGATIVE, POSITIVE.index_fill(0, torch.tensor(2), torch.nan)), "^positive_probs must be finite, got 1 of 4"),
        ((NEGATIVE, POSITIVE, UNKNOWN_PROBABILITY * torch.inf), "^unknown_probability must be finite, got 4 of 4"),
    ],
)
def test_score_of_wrong_arguments_raises(arguments, message):
    with pytest.raises(ValueError, match=message):
        bidirectional_score(*arguments)


# -- the query -------------------------------------------------------------------------------------------------------


def view_of(count, precision=0.5):
    empty = np.empty(0, np.int64)
    return PoolView(np.arange(count) * 10 + 5, empty, empty, empty, 2, 1, precision)


def unknown_probs(a):
    """Probabilities of two known classes and "unknown"."""
    a = torch.as_tensor(a)
    return torch.stack([1 - a, torch.zeros_like(a), a], 1)


def task_of_two():
    return BUAL("mlp", 2, input_shape=(3,))


def chosen(budget, a=None, precision=0.5, task=None, **scores):
    task = task or task_of_two()
    scores = {"negative_probs": NEGATIVE, "positive_probs": POSITIVE, **scores}
    if a is not None:
        scores |= {"unknown_probs": unknown_probs(a), "unknown_log_odds": torch.as_tensor(a).double().logit()}
    query = task.select(scores, view_of(len(scores["negative_probs"]), precision), budget, generator())
    return ((query.index - 5) // 10).tolist(), query.score.tolist()


def test_select_takes_the_smallest_scores():
    index, score = chosen(3, UNKNOWN_PROBABILITY)
    assert index == [2, 1, 0]
    assert score == pytest.approx([0.037037, 0.142857, 0.222222], abs=1e-6)
    assert chosen(4, UNKNOWN_PROBABILITY, task=BUAL("mlp", 2, input_shape=(3,), combine="paper"))[0] == [2, 3, 1, 0]
    assert chosen(4, None, 0.0)[0] == [2, 1, 3, 0]  # as in the first round
    assert chosen(9, UNKNOWN_PROBABILITY)[0] == [2, 1, 0, 3]  # a budget larger than the pool


def test_select_leaves_out_predicted_unknown_samples_and_scales_without_them():
    index, score = chosen(2, [0.1, 0.9, 0.3, 0.2])
    kept = [0, 2, 3]
    expected = bidirectional_score(NEGATIVE[kept], POSITIVE[kept], UNKNOWN_PROBABILITY[kept], 0.5)
    order = expected.argsort()[:2]
    assert index == [kept[i] for i in order]
    assert score == pytest.approx(expected[order].tolist())


def test_select_fills_up_with_the_least_unknown_of_those_left_out():
    index, score = chosen(4, [0.9, 0.2, 0.7, 0.8])
    assert index == [1, 2, 3, 0]
    assert score[0] == 0
    assert np.isnan(score[1:]).all()


def test_select_takes_the_least_unknown_where_all_are_predicted_unknown():
    a = [0.7, 0.8, 0.9, 0.8]
    index, score = chosen(4, a)
    assert index == [0, 1, 3, 2]  # by score alone: 2, 0, 1, 3
    assert score == pytest.approx(bidirectional_score(NEGATIVE, POSITIVE, torch.tensor(a), 0.5)[index].tolist())
    assert chosen(4, a, task=BUAL("mlp", 2, input_shape=(3,), combine="paper"))[0] == [0, 1, 3, 2]


@pytest.mark.parametrize("candidates", [0, 1])
def test_predicted_unknown_samples_of_probability_one_are_ranked_by_log_odds(candidates):
    logits = torch.zeros(5 + candidates, 3)
    logits[:5, 2] = torch.tensor([60.0, 40, 20, 25, 18])
    logits[5:, 0] = 4
    probabilities, lead = logits.softmax(1), unknown_log_odds(logits)
    assert lead.dtype == torch.float64
    assert lead[:5].tolist() == pytest.approx((logits[:5, 2] - np.log(2)).tolist())
    assert (probabilities[:5, 2] == 1).all()
    positive = torch.tensor([[0.8, 0.2], [0.9, 0.1], [0.7, 0.3], [0.6, 0.4], [0.95, 0.05], [0.6, 0.4]])
    scores = {
        "negative_probs": torch.full_like(positive, 0.5)[: len(logits)],
        "positive_probs": positive[: len(logits)],
        "unknown_probs": probabilities,
        "unknown_log_odds": lead,
    }
    query = task_of_two().select(scores, view_of(len(logits)), len(logits), generator())
    assert ((query.index - 5) // 10).tolist() == [5] * candidates + [4, 2, 3, 1, 0]


def test_tied_scores_go_to_the_less_certain_then_to_the_lower_index():
    # precision 0, no known class in the latest answers: every sample with w = 0 has score 0
    positive = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.6, 0.4], [0.5, 0.5]])
    assert chosen(4, [0.1, 0.1, 0.1, 0.4], 0.0, positive_probs=positive, negative_probs=NEGATIVE)[0] == [1, 2, 0, 3]


def test_select_with_missing_or_not_finite_scores_raises():
    negative = NEGATIVE.clone()
    negative[1] = -1
    with pytest.raises(ValueError, match="missing for 1 of 4 samples"):
        chosen(2, negative_probs=negative)
    negative[1] = torch.nan
    with pytest.raises(ValueError, match=r"^negative_probs must be finite, got 1 of 4"):
        chosen(2, negative_probs=negative)
    # even for a sample that is left out as unknown
    with pytest.raises(ValueError, match=r"^unknown_log_odds must be finite, got 1 of 4"):
        chosen(2, [0.1, 1.0, 0.2, 0.3])


# -- fits ------------------------------------------------------------------------------------------------------------


def data_of(unknown=6, known=4, hidden=None, **kwargs):
    """Made-up digits of which 4 classes are known, after one answered query; ``hidden`` redraws all true labels."""
    source = DigitsDataModule(fake=True, batch_size=16, val_fraction=0.0, augment=True)
    data = OpenSetDataModule(source, 4, initial_count=24, budget=10, **kwargs)
    data.setup()
    truth = data.oracle(data.unlabelled_indices)
    bought = [data.unlabelled_indices[truth == 4][:unknown], data.unlabelled_indices[truth < 4][:known]]
    if unknown or known:
        record = PoolRecord("pool.json")
        record.add_query(np.concatenate(bought), np.zeros(unknown + known), ["0"] * (unknown + known))
        answers = {int(i): UNKNOWN for i in bought[0]}
        record.add_answers(answers | {int(i): data.class_names[data.oracle(i)] for i in bought[1]}, "oracle")
        data.set_record(record)
    if hidden is not None:
        data._truth = hidden.integers(0, 5, len(data._truth))
    return data


def task_of(**kwargs):
    settings = {"negative_epochs": 2, "subset_size": 40, "snapshot_interval": 1, "channels_last": False}
    return BUAL("cnn_tiny", 4, input_shape=(1, 8, 8), **{**settings, **kwargs})


def trainer_of(**kwargs):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return L.Trainer(**{**quiet, "enable_checkpointing": False, "max_epochs": 4, **kwargs})


def fitted(data=None, trainer=None, ckpt_path=None, **kwargs):
    L.seed_everything(0, verbose=False)
    task, trainer = task_of(**kwargs), trainer or trainer_of()
    trainer.fit(task, datamodule=data or data_of(), ckpt_path=ckpt_path, weights_only=True)
    return task, trainer


def weights(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Spy(L.Callback):
    """Records batches, complementary labels, learning rates, and the weights before and after each epoch."""

    def __init__(self):
        self.networks, self.batches, self.complementary, self.lr, self.momenta = [], [], [], [], []
        self.before, self.after = [], []

    def on_train_batch_start(self, trainer, task, batch, batch_idx):
        self.networks.append((trainer.current_epoch, batch.network))
        self.batches.append((trainer.current_epoch, batch.network, batch.labelled.index, batch.labelled.target))

    def on_train_epoch_start(self, trainer, task):
        self.lr.append(trainer.optimizers[0].param_groups[0]["lr"])
        self.momenta.append(len(trainer.optimizers[0].state))
        self.before.append(weights(task))

    def on_train_batch_end(self, trainer, task, *args):
        if task.stage.start is not None:
            self.complementary.append(task._labels_of_epoch().clone())

    def on_train_epoch_end(self, trainer, task):
        self.after.append(weights(task))


@pytest.fixture(scope="module")
def one_run():
    """One fit with two epochs in each stage, recorded by a ``Spy``."""
    torch.manual_seed(0)
    spy, data = Spy(), data_of()
    factory = {
        "optimizer": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2),
        "lr_scheduler": lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.5),
    }
    task, trainer = fitted(data, trainer_of(callbacks=[spy]), **factory)
    return task, trainer, data, spy


def test_order_of_the_networks_and_the_samples_each_trains_on(one_run):
    task, _, data, spy = one_run
    assert list(dict.fromkeys(spy.networks)) == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 2), (3, 2)]
    seen = {
        n: set(torch.cat([index for _, network, index, _ in spy.batches if network == n]).tolist()) for n in range(3)
    }
    known, unknown = set(data.known_indices.tolist()), set(data.unknown_indices.tolist())
    assert seen[0] == known
    assert seen[1] == known | unknown
    assert seen[2] <= known | set(task.stage.subset.tolist())
    assert len(task.stage.subset) == 40
    assert set(task.stage.subset) <= set(data.unlabelled_indices)
    for _, network, index, target in spy.batches:
        assert torch.equal(target, data.train_target[index])
        assert int(target.max()) <= (4 if network == 1 else 3)
        assert int(target.min()) >= (-1 if network == 2 else 0)


def test_each_stage_changes_only_its_own_networks(one_run):
    task, _, _, spy = one_run
    first, second, third, fourth = spy.after

    def part(state, name):
        return {k: v for k, v in state.items() if k.startswith(f"{name}.")}

    for name in ("network", "auxiliary"):
        assert not equal(part(first, name), part(second, name))
        # neither weights (by decay or momentum) nor running statistics change afterwards
        assert equal(part(second, name), part(third, name))
        assert equal(part(third, name), part(fourth, name))
    assert equal(part(first, "negative"), part(second, "negative"))
    assert not equal(part(second, "negative"), part(third, "negative"))
    assert equal(weights(task.network), {k[len("network.") :]: v for k, v in part(second, "network").items()})


def test_the_negative_stage_starts_from_the_backbone_with_a_fresh_optimizer(one_run):
    _, _, _, spy = one_run
    assert spy.lr == [0.05, 0.025, 0.05, 0.025]  # the schedule starts anew
    assert spy.momenta[1] > 0
    assert spy.momenta[2] == 0
    head = {"negative.fc.weight", "negative.fc.bias"}
    start = {name: value for name, value in spy.before[2].items() if name.startswith("negative.")}
    assert head < start.keys()
    for name, value in start.items():
        origin = spy.before[0][name] if name in head else spy.after[1][name.replace("negative.", "network.", 1)]
        assert torch.equal(value, origin), name


def test_complementary_labels_are_redrawn_each_epoch_and_wrong_if_known(one_run):
    task, _, data, spy = one_run
    first, last = spy.complementary[0], spy.complementary[-1]
    known, subset = torch.from_numpy(data.known_indices), torch.from_numpy(task.stage.subset)
    assert not torch.equal(first[subset], last[subset])
    assert (first[known] != data.train_target[known]).all()
    assert int(first.max()) <= 3
    both = np.union1d(data.known_indices, task.stage.subset)
    draws = complementary_labels(data.train_target[torch.from_numpy(both)], 4, numpy_generator(0, "complementary", 2))
    assert torch.equal(first[torch.from_numpy(both)], draws)


def test_snapshots_are_averaged_by_index(one_run):
    task, trainer, data, _ = one_run
    assert task.stage.snapshots == 3  # the untrained head, and after each epoch
    rows = task.stage.sum.rows
    pool = torch.from_numpy(data.unlabelled_indices)
    torch.testing.assert_close(rows[pool].sum(1), torch.full((len(pool),), 3.0))
    assert int((rows.sum(1) > 0).sum()) == len(pool)
    outputs = trainer.predict(task, datamodule=data)
    got = {name: torch.cat([o[name] for o in outputs]) for name in outputs[0]}
    assert got["index"].tolist() == pool.tolist()
    torch.testing.assert_close(got["negative_probs"], rows[pool] / 3)
    assert torch.equal(got["positive_probs"], got["probabilities"])
    assert got["unknown_probs"].shape == (len(pool), 5)
    torch.testing.assert_close(got["unknown_probs"].sum(1), torch.ones(len(pool)))
    assert got["unknown_log_odds"].dtype == torch.float64
    torch.testing.assert_close(got["unknown_log_odds"].sigmoid().float(), got["unknown_probs"][:, 4])
    query = task.select(got, data.view(), 7, generator())
    assert len(set(query.index)) == 7
    assert set(query.index) <= set(data.unlabelled_indices)


def test_metrics_are_those_of_the_positive_network(one_run):
    task, trainer, data, spy = one_run
    metrics = trainer.test(task, datamodule=data, verbose=False)[0]
    other = task_of()
    other.load_state_dict(spy.after[1])  # as the positive stage left it
    assert trainer_of().test(other, datamodule=data, verbose=False)[0] == metrics
    assert task.exports()["network"] is task.network


def test_snapshot_settings_determine_the_number_of_snapshots():
    task, _ = fitted(
        trainer=trainer_of(max_epochs=6), negative_epochs=5, snapshot_interval=2, include_initial_snapshot=False
    )
    assert (task.stage.start, task.stage.snapshots) == (1, 2)


def test_first_round_trains_and_queries_without_the_auxiliary_network():
    spy = Spy()
    data = data_of(unknown=0, known=0)
    task, trainer = fitted(data, trainer_of(callbacks=[spy]))
    assert {network for _, network in spy.networks} == {0, 2}
    outputs = trainer.predict(task, datamodule=data)
    assert "unknown_probs" not in outputs[0]
    got = {name: torch.cat([o[name] for o in outputs]) for name in outputs[0]}
    query = task.select(got, data.view(), 5, generator())
    least = got["negative_probs"].double().amax(1).argsort(stable=True)[:5]
    assert query.index.tolist() == data.unlabelled_indices[least].tolist()


def test_losses_are_logged_and_negative_loss_only_in_its_stage(tmp_path):
    from lightning_kd.core.run_logger import RunLogger

    fitted(trainer=trainer_of(logger=RunLogger(tmp_path)))
    header, *rows = (tmp_path / "metrics.csv").read_text().splitlines()
    names = {"train/loss", "train/acc", "train/auxiliary_loss", "train/auxiliary_acc", "train/negative_loss"}
    assert names <= set(header.split(","))
    column = header.split(",").index("train/negative_loss")
    assert [bool(row.split(",")[column]) for row in rows] == [False, False, True, True]


@pytest.mark.parametrize("stop", [0, 1, 2])
@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_resume_equals_an_undisturbed_run(tmp_path, stop, interval):
    """After the first epoch, exactly at the switch, and inside the negative stage."""
    factory = {"lr_scheduler": CosineAnnealing, "lr_interval": interval}
    every = ModelCheckpoint(
        tmp_path, "{epoch}", save_top_k=-1, every_n_epochs=1, save_on_train_epoch_end=True, auto_insert_metric_name=True
    )
    whole, _ = fitted(trainer=trainer_of(enable_checkpointing=True, callbacks=[every]), **factory)
    L.seed_everything(1, verbose=False)  # the result must not depend on the global generators
    spy = Spy()
    again, _ = fitted(trainer=trainer_of(callbacks=[spy]), ckpt_path=tmp_path / f"epoch={stop}.ckpt", **factory)
    assert spy.networks[0][0] == stop + 1
    assert equal(weights(whole), weights(again))
    assert torch.equal(whole.stage.sum.rows, again.stage.sum.rows)
    assert again.stage.snapshots == 3
    assert np.array_equal(whole.stage.subset, again.stage.subset)


def cosine(length):
    return pytest.approx([0.05 * (1 + math.cos(math.pi * epoch / length)) for epoch in range(length)])


def rates_of(schedule, max_epochs=5, last_round=False, ckpt_path=None, save=None, **kwargs):
    """The learning rate of each epoch and after the last one; the last 2 epochs are the negative stage."""
    spy = Spy()
    task = task_of(optimizer=lambda p: torch.optim.SGD(p, lr=0.1), lr_scheduler=schedule, **kwargs)
    task.query_follows = not last_round
    trainer = trainer_of(max_epochs=max_epochs, callbacks=[spy])
    trainer.fit(task, datamodule=data_of(), ckpt_path=ckpt_path, weights_only=True)
    if save is not None:
        trainer.save_checkpoint(save)
    return [*spy.lr, trainer.optimizers[0].param_groups[0]["lr"]]


@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_each_stage_runs_a_whole_learning_rate_schedule(interval):
    rates = rates_of(CosineAnnealing, lr_interval=interval)
    assert rates[:3] == cosine(3)
    assert rates[3:5] == cosine(2)
    assert rates[5] == pytest.approx(0, abs=1e-9)
    assert rates_of(CosineAnnealing, last_round=True, lr_interval=interval)[:3] == cosine(3)

    def after_a_warmup(optimizer):
        parts = [torch.optim.lr_scheduler.ConstantLR(optimizer, 0.5, 1), CosineAnnealing(optimizer)]
        return torch.optim.lr_scheduler.SequentialLR(optimizer, parts, [1])

    if interval == "epoch":
        assert rates_of(after_a_warmup, 6) == pytest.approx([0.05, 0.1, 0.1 * 0.75, 0.1 * 0.25, 0.05, 0.1, 0], abs=1e-9)


def test_resume_with_more_epochs_warns_and_each_stage_runs_a_whole_schedule(tmp_path):
    rates_of(CosineAnnealing, 5, last_round=True, save=tmp_path / "some.ckpt")  # ends after the positive stage
    with pytest.warns(UserWarning, match=r"goes from 0\.025 in the last epoch trained up to 0\.0345"):
        later = rates_of(CosineAnnealing, 7, ckpt_path=tmp_path / "some.ckpt")
    assert later[:-1] == pytest.approx([0.03454915, 0.00954915, 0.1, 0.05], abs=1e-6)


def schedule_warnings(schedule, **kwargs):
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        rates_of(schedule, **kwargs)
    return [str(one.message) for one in record if "T_max" in str(one.message)]


def test_schedule_of_another_length_than_its_stage_warns():
    def of(length):
        return lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, length)

    assert schedule_warnings(of(2), max_epochs=4) == []
    (found,) = schedule_warnings(of(3), max_epochs=5)
    assert "T_max 3, the negative stage has 2 epochs, so it ends at" in found
    found = schedule_warnings(of(5), max_epochs=5)
    assert ["set T_max to 3" in found[0], "set T_max to 2" in found[1], len(found)] == [True, True, 2]
    assert "CosineAnnealing, as long as the stage" in found[0]


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
def test_resume_within_a_negative_epoch_trains_only_its_other_batches(tmp_path, one_run):
    _, _, _, watched = one_run
    networks = [network for _, network in watched.networks]
    step = networks.index(2) + 1  # one step into the negative stage
    every = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=step)
    fitted(trainer=trainer_of(enable_checkpointing=True, callbacks=[every], max_epochs=3), negative_epochs=1)
    spy = Spy()
    again, _ = fitted(
        trainer=trainer_of(callbacks=[spy], max_epochs=3), ckpt_path=tmp_path / f"step={step}.ckpt", negative_epochs=1
    )
    assert set(spy.networks) == {(2, 2)}
    assert len(spy.networks) == networks[step - 1 :].count(2) // 2 - 1
    assert torch.equal(spy.complementary[0], watched.complementary[0])
    assert again.stage.snapshots == 2


def test_loaded_checkpoint_gives_the_same_pool_scores(tmp_path):
    data = data_of()
    task, trainer = fitted(data)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = BUAL.load_from_checkpoint(tmp_path / "last.ckpt")
    a, b = (trainer_of().predict(t, datamodule=data) for t in (task, loaded))
    assert all(torch.equal(x[name], y[name]) for x, y in zip(a, b, strict=True) for name in x)


def queried_indices(data):
    task, trainer = fitted(data)
    outputs = trainer.predict(task, datamodule=data)
    got = {name: torch.cat([o[name] for o in outputs]) for name in outputs[0]}
    return task.select(got, data.view(), 10, generator()).index.tolist()


def test_query_does_not_depend_on_labels_of_unlabelled_samples():
    assert queried_indices(data_of()) == queried_indices(data_of(hidden=generator(3)))


def test_second_fit_starts_its_stages_and_snapshots_anew():
    data = data_of()
    task, _ = fitted(data)
    trainer_of(max_epochs=3).fit(task, datamodule=data)
    assert (task.stage.start, task.stage.snapshots) == (1, 3)


def test_scores_before_the_negative_stage_raise():
    data = data_of()
    with pytest.raises(ValueError, match=r"the negative head has 0 of 3 snapshots: .* negative_epochs=2"):
        trainer_of().predict(task_of(), datamodule=data)


def test_last_round_skips_the_negative_stage_unless_min_epochs_needs_it(one_run):
    """No query follows the last round; the reported network has the same weights."""
    _, _, _, watched = one_run
    factory = {
        "optimizer": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2),
        "lr_scheduler": lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.5),
    }
    for least, epochs in ((None, 2), (3, 4)):  # with min_epochs=3 both stages are trained
        spy = Spy()
        L.seed_everything(0, verbose=False)
        task, trainer = task_of(**factory), trainer_of(callbacks=[spy], min_epochs=least)
        task.query_follows = False
        trainer.fit(task, datamodule=data_of())
        assert len(spy.after) == epochs
        reported = {name for name in spy.after[-1] if name.startswith("network.")}
        assert all(torch.equal(task.state_dict()[name], watched.after[-1][name]) for name in reported)
    task.stage.snapshots = 0
    with pytest.raises(ValueError, match=r"the last round of a finished run has none"):
        trainer.predict(task, datamodule=data_of())


@pytest.mark.parametrize(("size", "batches"), [(None, 2), (9, 4), (100, 1)])
def test_auxiliary_batch_size_sets_the_batches_of_the_auxiliary_network(size, batches):
    spy, data = Spy(), data_of(unknown=4, known=4)  # with the 24 at the start, 32 samples
    fitted(data, trainer_of(max_epochs=2, callbacks=[spy]), negative_epochs=1, auxiliary_batch_size=size)
    of = {number: [len(b[2]) for b in spy.batches if b[1] == number] for number in (0, 1)}
    assert len(of[1]) == batches
    assert sum(of[1]) == 32
    assert max(of[0]) == 16


@pytest.mark.filterwarnings("ignore:.*max_epochs")
def test_scores_after_a_fit_cut_short_by_max_steps_raise(one_run):
    task, trainer, data, spy = one_run
    steps = sum(epoch < 3 for epoch, _ in spy.networks)  # of all epochs but the last
    task, trainer = fitted(data, trainer_of(max_steps=steps))
    with pytest.raises(ValueError, match=r"has 2 of 3 snapshots: .* without max_time or max_steps"):
        trainer.predict(task, datamodule=data)


def test_early_stopping_is_refused():
    with pytest.raises(ValueError, match=r"got EarlyStopping, .*: take it out of trainer.callbacks"):
        fitted(trainer=trainer_of(callbacks=[EarlyStopping("val/acc")]))


def test_samples_without_a_snapshot_score_minus_one_and_nan_stays_nan(one_run):
    task, _, data, _ = one_run
    index = torch.tensor([int(data.unlabelled_indices[0]), int(data.known_indices[0]), len(data.train_target) + 3])
    task.eval()
    negative = task.pool_scores(torch.zeros(3, 1, 8, 8), index)[1]["negative_probs"]
    assert (negative == -1).all(1).tolist() == [False, True, True]
    rows = task.stage.sum.rows
    try:
        task.stage.sum.rows = rows.index_fill(0, index[:1], torch.nan)
        negative = task.pool_scores(torch.zeros(3, 1, 8, 8), index)[1]["negative_probs"]
    finally:
        task.stage.sum.rows = rows
    assert negative.isnan().any(1).tolist() == [True, False, False]  # NaN is not taken for a missing sample


@pytest.mark.parametrize("epochs", [1, 2, -1])
def test_too_few_epochs_are_refused_before_training(epochs):
    with pytest.raises(ValueError, match=f"max_epochs must be above negative_epochs=2, got {epochs}"):
        fitted(trainer=trainer_of(max_epochs=epochs))


@pytest.mark.parametrize("initial", [True, False])
def test_fast_dev_run_fits_and_selects(initial):
    data = data_of()
    task, trainer = fitted(data, trainer_of(fast_dev_run=True), include_initial_snapshot=initial)
    scores = trainer.predict(task, datamodule=data)[0]
    assert task.select(scores, view_of(len(scores["index"])), 2, generator()).index.shape == (2,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"negative_epochs": 0}, "negative_epochs must be at least 1"),
        ({"subset_size": 0}, "subset_size must be at least 1"),
        ({"auxiliary_batch_size": 0}, "auxiliary_batch_size must be at least 1, got 0"),
        ({"snapshot_interval": 3}, "snapshot_interval must be at least 1 and at most 2, got 3"),
        ({"uncertainty": "sure"}, "uncertainty must be"),
        ({"combine": "both"}, "combine must be"),
        ({"subset": "all"}, "subset must be"),
    ],
)
def test_wrong_arguments_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        task_of(**arguments)


def test_subset_option_takes_predicted_known_samples_or_the_whole_pool():
    """The auxiliary network predicts the brighter images unknown."""

    class Half(nn.Linear):
        def forward(self, image):
            unknown = image.flatten(1).mean(1) > 0
            return super().forward(image.flatten(1)) * 0 + nn.functional.one_hot(unknown * 4, 5)

    seen = {}
    for subset in ("candidates", "pool"):
        data = data_of()
        L.seed_everything(0, verbose=False)
        task = task_of(subset=subset, subset_size=10**6)
        task.auxiliary = Half(64, 5)
        trainer_of().fit(task, datamodule=data)
        seen[subset] = set(task.stage.subset.tolist())
    image = torch.cat([batch.image for batch in data.loader("train", data.unlabelled_indices)])
    bright = (image.flatten(1).mean(1) > 0).numpy()
    assert seen["pool"] == set(data.unlabelled_indices.tolist())
    assert seen["candidates"] == set(data.unlabelled_indices[~bright].tolist()) < seen["pool"]


def test_custom_network_trains_through_both_stages():
    L.seed_everything(0, verbose=False)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 4))
    data = data_of()
    task = BUAL(network, 4, input_shape=(1, 8, 8), negative_epochs=1, snapshot_interval=1)
    assert task.network is network
    trainer_of(max_epochs=2).fit(task, datamodule=data)
    assert task.stage.snapshots == 2
    assert task.auxiliary(torch.zeros(2, 1, 8, 8)).shape == (2, 5)


class TwoHeads(nn.Module):
    """Its classifier, ``top``, is not the linear layer defined last."""

    def __init__(self):
        super().__init__()
        self.hidden, self.top, self.unused = nn.Linear(64, 8), nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, image):
        return self.top(self.hidden(image.flatten(1)).relu())


def test_named_classifier_is_the_only_layer_not_copied_to_the_negative_head():
    L.seed_everything(0, verbose=False)
    task = BUAL(TwoHeads(), 4, input_shape=(1, 8, 8), negative_epochs=1, snapshot_interval=1, classifier="top")
    spy = Spy()
    trainer_of(max_epochs=2, callbacks=[spy]).fit(task, datamodule=data_of())
    assert task.auxiliary.top.out_features == 5
    start, positive = spy.before[1], spy.after[0]
    for name in ("hidden.weight", "hidden.bias", "unused.weight", "unused.bias"):
        assert torch.equal(start[f"negative.{name}"], positive[f"network.{name}"])
    assert torch.equal(start["negative.top.weight"], spy.before[0]["negative.top.weight"])
    with pytest.raises(ValueError, match="classifier path 'flop' is nothing in TwoHeads"):
        BUAL(TwoHeads(), 4, input_shape=(1, 8, 8), classifier="flop")


def test_networks_that_differ_in_more_than_the_classifier_are_refused():
    task = task_of()
    task.negative = nn.Sequential(task.negative, nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match="must differ in classifier 'fc' only, got a difference in"):
        trainer_of(max_epochs=3).fit(task, datamodule=data_of())


def test_fit_with_an_empty_pool_takes_no_snapshot():
    data = data_of()
    rest = data.unlabelled_indices
    names = [*data.class_names, UNKNOWN]
    data.record.add_query(rest, np.zeros(len(rest)), ["0"] * len(rest))
    data.record.add_answers({int(i): names[data.oracle(i)] for i in rest}, "oracle")
    data.set_record(data.record)
    assert len(data.unlabelled_indices) == 0
    task, _ = fitted(data)
    assert task.stage.snapshots == 0
    assert len(task.stage.subset) == 0


def rank_result():
    L.seed_everything(0, verbose=False)
    spy, task = Spy(), task_of()
    trainer = trainer_of(devices=2, strategy="ddp", callbacks=[spy])
    trainer.fit(task, datamodule=data_of())
    moved = [k for k, v in spy.after[1].items() if k.startswith("network.") and not torch.equal(v, spy.after[3][k])]
    return {
        "subset": task.stage.subset.tolist(),
        "complementary": spy.complementary[-1].tolist(),
        "sum": task.stage.sum.rows.tolist(),
        "snapshots": task.stage.snapshots,
        "weights": [p.sum().item() for p in task.parameters()],
        "moved": [k for k in moved if "running" not in k and "num_batches" not in k],
    }


def test_two_processes_agree():
    first, second = on_two_ranks(rank_result)
    assert first == second
    assert first["moved"] == []
    assert first["snapshots"] == 3
    assert len(first["subset"]) == 40


# -- the losses ------------------------------------------------------------------------------------------------------


class Steps(L.Callback):
    """Records each step's batch, its complementary labels, and the trained network before and after the step."""

    def __init__(self):
        self.steps = []

    def on_train_batch_start(self, trainer, task, batch, batch_idx):
        self.before = copy.deepcopy([task.network, task.auxiliary, task.negative][batch.network])

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        after = [task.network, task.auxiliary, task.negative][batch.network]
        wrong = task._labels_of_epoch()[batch.labelled.index] if batch.network == 2 else None
        self.steps.append((batch.network, batch.labelled, wrong, self.before, weights(after)))


def loss_written_out(number, logits, target, wrong, exact):
    """Cross-entropy with the label; for the negative head (2), ``-log(1 - p)`` of the complementary label."""
    chosen = F.one_hot(target if number < 2 else wrong, logits.shape[1]).bool()
    if number < 2:
        return (logits.logsumexp(1) - logits[chosen]).mean()
    log_rest = logits.masked_fill(chosen, float("-inf")).logsumexp(1) - logits.logsumexp(1)
    return -(log_rest if exact else log_rest.clamp(min=math.log(1e-5))).mean()


@pytest.mark.parametrize("exact", [True, False])
def test_every_step_descends_the_loss_of_its_network(exact):
    watch = Steps()
    trainer = trainer_of(callbacks=[watch], precision="64-true")
    L.seed_everything(0, verbose=False)
    task = task_of(exact=exact, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    task.negative.get_submodule(task.classifier_path).weight.data *= 50  # so confident that the clamp acts
    trainer.fit(task, data_of())
    assert {number for number, *_ in watch.steps} == {0, 1, 2}
    clamped = 0
    for number, batch, wrong, network, after in watch.steps:
        network = network.double().train()
        names, parameters = zip(*network.named_parameters(), strict=True)
        logits = network(batch.image.double())
        loss = loss_written_out(number, logits, batch.target, wrong, exact)
        for name, parameter, gradient in zip(names, parameters, torch.autograd.grad(loss, parameters), strict=True):
            torch.testing.assert_close(after[name], parameter.detach() - 0.1 * gradient, rtol=0, atol=1e-10)
        if wrong is not None:
            clamped += int((logits.softmax(1)[torch.arange(len(logits)), wrong] > 1 - 1e-5).sum())
            known = batch.target >= 0  # pool samples have the target -1
            assert (wrong[known] != batch.target[known]).all()
    assert clamped
