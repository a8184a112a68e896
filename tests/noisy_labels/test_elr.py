"""ELR and ELR+ as tasks: memories, averaged copies, ramps, resume, two processes."""

import copy
import csv
import math
import warnings
from unittest.mock import patch

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_kd.core.batch import Batch
from lightning_kd.core.phased_loader import PhaseBatch
from lightning_kd.core.sample_memory import SampleMemory
from lightning_kd.noisy_labels import ELR, ELRPlus, elr_regularizer
from lightning_kd.noisy_labels import elr as elr_module
from lightning_kd.noisy_labels.elr import _clamped, _remember, ramp
from lightning_kd.noisy_labels.two_networks import TwoNetworkTask
from tests.noisy_labels.runs import data_module, fitted, resumes_to_the_bit, trainer_of
from tests.two_processes import on_two_ranks

P = torch.tensor([[0.7, 0.2, 0.1]])


def elr(momentum=0.7, weight=3.0):
    task = ELR("cnn_tiny", 3, input_shape=(1, 8, 8), momentum=momentum, weight=weight)
    task.memory.allocate(4, torch.device("cpu"))
    return task


def test_memory_starts_at_0_and_converges_to_the_prediction():
    task = elr()
    batch = Batch(None, torch.tensor([1]), torch.tensor([2]))
    terms = task.noisy_loss(P.log(), batch)
    torch.testing.assert_close(task.memory.rows[2], torch.tensor([0.21, 0.06, 0.03]))
    assert not task.memory.rows[[0, 1, 3]].any()
    assert (terms["ce"].item(), terms["elr"].item()) == pytest.approx((1.609438, -0.530212), abs=1e-6)
    for _ in range(60):
        task.noisy_loss(P.log(), batch)
    torch.testing.assert_close(task.memory.rows[2], P[0])
    assert task.memory.rows.dtype == torch.float32


def test_loss_has_no_gradient_through_the_memory():
    task = elr()
    logits = torch.randn(2, 3).half().requires_grad_()
    terms = task.noisy_loss(logits.float(), Batch(None, torch.tensor([0, 1]), torch.tensor([1, 3])))
    sum(terms.values()).backward()
    assert not task.memory.rows.requires_grad
    fixed = logits.detach().float().requires_grad_()
    loss = F.cross_entropy(fixed, torch.tensor([0, 1])) + 3 * elr_regularizer(fixed, task.memory.rows[[1, 3]])
    loss.backward()
    torch.testing.assert_close(logits.grad.float(), fixed.grad, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_memory_keeps_float32_at_any_precision_of_the_logits(dtype):
    task = elr()
    task.noisy_loss(P.log().to(dtype), Batch(None, torch.tensor([1]), torch.tensor([2])))
    assert task.memory.rows.dtype == torch.float32
    torch.testing.assert_close(task.memory.rows[2], torch.tensor([0.21, 0.06, 0.03]), rtol=1e-2, atol=0)


def test_memory_of_a_saturated_prediction_is_clamped_and_normalised():
    memory = SampleMemory((3,))
    memory.allocate(1, torch.device("cpu"))
    rows = _remember(memory, torch.tensor([0]), _clamped(torch.tensor([[90.0, 0.0, 0.0]])), 0.0)
    total = 1 - 1e-4 + 2e-4
    torch.testing.assert_close(rows, torch.tensor([[1 - 1e-4, 1e-4, 1e-4]]) / total)
    assert rows.sum().item() == pytest.approx(1)


@pytest.mark.parametrize(
    ("step", "length", "value"), [(0, 0, 1.0), (5, 0, 1.0), (0, 8, math.exp(-5)), (4, 8, math.exp(-1.25)), (9, 8, 1.0)]
)
def test_ramp_gives_worked_numbers(step, length, value):
    assert ramp(step, length) == pytest.approx(value)


METHODS = [
    (ELR, {}),
    (ELRPlus, {}),
    (ELRPlus, {"averages_in_train_mode": False}),
    (ELRPlus, {"ramp_steps": 20, "average_steps": 30, "refine_labels": True}),
]


@pytest.mark.parametrize(("method", "arguments"), METHODS)
def test_fit_logs_metrics_and_writes_noisy_labels_csv(method, arguments, tmp_path):
    task, trainer = fitted(method, **arguments)
    data = trainer.datamodule
    for key in ("loss", "loss_ce", "loss_elr", "acc", "clean_auc", "pure_ratio"):
        assert trainer.callback_metrics[f"train/{key}"].isfinite(), key
    assert trainer.callback_metrics["train/loss_elr"] < 0
    for memory in task.memories.values():
        total = memory.rows[data.train_indices].sum(1)
        torch.testing.assert_close(total, torch.full_like(total, 1 - 0.7**2))  # two visits each
    task.write_results(tmp_path)
    assert len(list(csv.DictReader((tmp_path / "noisy_labels.csv").open()))) == data.train_size
    trainer.test(task, datamodule=data, verbose=False)
    assert 0 <= trainer.callback_metrics["test/acc"] <= 1


@pytest.mark.parametrize(("method", "arguments"), METHODS)
def test_resumes_to_the_bit(method, arguments, tmp_path):
    assert resumes_to_the_bit(method, tmp_path, **arguments)


@pytest.mark.parametrize("method", [ELR, ELRPlus])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"momentum": 1.0}, "momentum must be at least 0 and below 1, got 1.0"),
        ({"weight": -1.0}, "weight must be at least 0, got -1.0"),
    ],
)
def test_wrong_arguments_of_both_methods_raise(method, arguments, message):
    with pytest.raises(ValueError, match=message):
        method("cnn_tiny", 10, input_shape=(1, 8, 8), **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ramp_steps": -1}, "ramp_steps must be at least 0, got -1"),
        ({"average_steps": -1}, "average_steps must be at least 0, got -1"),
        ({"average_rate": 1.0}, "average_rate must be at least 0 and below 1, got 1.0"),
        ({"mixup_alpha": 0.0}, "mixup_alpha must be above 0, got 0.0"),
    ],
)
def test_wrong_arguments_of_elr_plus_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        ELRPlus("cnn_tiny", 10, input_shape=(1, 8, 8), **arguments)


def test_averages_in_eval_mode_give_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", ".*in eval mode at the start")
        fitted(ELRPlus, trainer=trainer_of(max_epochs=1), averages_in_train_mode=False)
        fitted(ELRPlus, trainer=trainer_of(max_epochs=1))


def test_batch_without_index_raises():
    task = ELR("cnn_tiny", 10, input_shape=(1, 8, 8))
    pairs = TensorDataset(torch.randn(8, 1, 8, 8), torch.arange(8))
    with pytest.raises(ValueError, match="the batch has no index"):
        trainer_of().fit(task, DataLoader(pairs, batch_size=4))


# -- ELR+ ------------------------------------------------------------------------------------------------------------


class CheckedELRPlus(ELRPlus):
    """Checks each step against the formulas."""

    def network_step(self, k, batch):
        labelled = batch.labelled
        memory = self.memories[f"predictions_{k + 1}"].rows[labelled.index].clone()
        in_train_mode = self.averages_in_train_mode
        assert all(average.training == in_train_mode for average in self.averages)
        expected = copy.deepcopy(self.averages[1 - k])
        with torch.no_grad():
            other = expected(labelled.image).softmax(1)
        old = copy.deepcopy(self.averages)
        terms, logits, target = super().network_step(k, batch)
        for mine, before, after in zip(
            self.averages[1 - k].buffers(), old[1 - k].buffers(), expected.buffers(), strict=True
        ):
            torch.testing.assert_close(mine, after)
            assert torch.equal(before, after) != in_train_mode  # predicting in train mode updates them
        assert all(map(torch.equal, self.averages[k].buffers(), old[k].buffers()))
        rows = self.memories[f"predictions_{k + 1}"].rows[labelled.index]
        torch.testing.assert_close(rows, 0.7 * memory + 0.3 * other)
        weight, partner = self.drawn
        q = weight * rows + (1 - weight) * rows[partner]
        one_hot = F.one_hot(target, 10).float()
        label = weight * one_hot + (1 - weight) * one_hot[partner]
        if self.refine_labels:
            label = label * q / (label * q).sum(1, keepdim=True)
        p = logits.softmax(1).clamp(1e-4, 1 - 1e-4)
        torch.testing.assert_close(terms["ce"], -(label * logits.log_softmax(1)).sum(1).mean())
        expected = 3.0 * math.exp(-5 * (1 - (self.steps_done[k] + 1) / 50) ** 2) * (1 - (q * p).sum(1)).log().mean()
        torch.testing.assert_close(terms["elr"], expected)
        self.steps_seen.append(k)
        return terms, logits, target

    def optimize(self, k, terms, logits, target):
        old = [p.clone() for p in self.averages[k].parameters()]
        resting = [p.clone() for p in [*self.networks[1 - k].parameters(), *self.averages[1 - k].parameters()]]
        statistics = [b.clone() for b in self.averages[k].buffers()]
        super().optimize(k, terms, logits, target)
        step = self.steps_done[k] + self.averages_in_train_mode
        rate = 0.997 * math.exp(-5 * (1 - step / 100) ** 2)
        theirs = statistics if self.averages_in_train_mode else self.networks[k].buffers()
        assert all(map(torch.equal, self.averages[k].buffers(), theirs))
        for a, b, p in zip(old, self.averages[k].parameters(), self.networks[k].parameters(), strict=True):
            torch.testing.assert_close(b, rate * a + (1 - rate) * p)
        after = [*self.networks[1 - k].parameters(), *self.averages[1 - k].parameters()]
        assert all(torch.equal(a, b) for a, b in zip(resting, after, strict=True))


@pytest.mark.parametrize(("refine", "in_train_mode"), [(False, True), (True, True), (True, False)])
def test_each_step_equals_the_algorithm(refine, in_train_mode, monkeypatch):
    draw = elr_module.draw_mix

    def noted(*args):
        task.drawn = draw(*args)
        return task.drawn

    monkeypatch.setattr(elr_module, "draw_mix", noted)
    L.seed_everything(0, verbose=False)
    task = CheckedELRPlus(
        "cnn_tiny",
        10,
        input_shape=(1, 8, 8),
        channels_last=False,
        ramp_steps=50,
        average_steps=100,
        refine_labels=refine,
        averages_in_train_mode=in_train_mode,
    )
    task.steps_seen = []
    data = data_module()
    trainer_of().fit(task, datamodule=data)
    steps = len(data.loader("train", shuffle=True))
    assert task.steps_seen == 2 * [*[0] * steps, *[1] * steps]
    assert task.steps_done == [2 * steps, 2 * steps]


def test_average_rate_is_one_step_ahead_in_train_mode():
    rates = []
    for in_train_mode in (True, False):
        task = ELRPlus(
            nn.Linear(4, 3).double(), 3, input_shape=(4,), average_steps=40, averages_in_train_mode=in_train_mode
        )
        with torch.no_grad():
            for weights, value in ((task.averages[0], 1.0), (task.networks[0], 0.0)):
                weights.weight.fill_(value)
        task.trainer = trainer_of()
        with patch.object(TwoNetworkTask, "optimize"):
            task.optimize(0, {}, torch.empty(0), torch.empty(0))
        rates.append(float(task.averages[0].weight[0, 0].detach()))
    assert rates == [pytest.approx(0.010938085, abs=1e-8), pytest.approx(0.008598827, abs=1e-8)]


def test_average_updates_its_own_running_statistics_in_train_mode():
    task = ELRPlus(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)), 3, input_shape=(4,))
    image = torch.randn(16, 4) + 3
    task.averaged_logits(1, image)
    torch.testing.assert_close(task.averages[1][0].running_mean, 0.1 * image.mean(0))
    assert torch.equal(task.networks[1][0].running_mean, torch.zeros(4))
    task.eval()
    kept = task.averages[1][0].running_mean.clone()
    task(image)
    assert torch.equal(task.averages[1][0].running_mean, kept)


@pytest.mark.parametrize("in_train_mode", [True, False])
def test_averages_join_the_scores_are_exported_and_not_trained(in_train_mode):
    task = ELRPlus("cnn_tiny", 10, input_shape=(1, 8, 8), averages_in_train_mode=in_train_mode)
    task.train()
    assert task.networks[0].training
    assert all(module.training == in_train_mode for module in task.averages.modules())
    with torch.no_grad():
        for p in task.averages[1].parameters():
            p.mul_(1.5)
    task.eval()
    image = torch.randn(3, 1, 8, 8)
    scores, probabilities = task.scores_and_probabilities(image)
    torch.testing.assert_close(scores, (task.networks[0](image) + task.averages[1](image)) / 2)
    torch.testing.assert_close(probabilities, scores.softmax(1))
    assert set(task.exports()) == {"network_1", "network_2", "network_1_averaged", "network_2_averaged"}
    trained = {id(p) for k in range(2) for part in task.parts(k) for p in part.parameters()}
    assert not any(id(p) in trained or p.requires_grad for p in task.averages.parameters())


def test_refined_labels_are_finite_if_the_memory_lacks_their_class(monkeypatch):
    task, _ = fitted(ELRPlus, refine_labels=True, trainer=trainer_of(max_epochs=1))
    phase = task.phases(task.trainer.datamodule)[0]
    batch = next(iter(phase.labelled))
    monkeypatch.setattr(task, "averaged_logits", lambda k, image: 1e4 * F.one_hot((batch.target + 1) % 10, 10).float())
    task.memories["predictions_1"].rows.zero_()
    task.momentum = 0.0
    terms, _, _ = task.network_step(0, PhaseBatch(0, batch))
    assert terms["ce"].isfinite()


# -- two processes ---------------------------------------------------------------------------------------------------


def _train_on_two(name):
    warnings.simplefilter("ignore")
    method = {"ELR": ELR, "ELRPlus": ELRPlus}[name]
    data = data_module(batch_size=16)
    task, _ = fitted(method, data, trainer=trainer_of(strategy="ddp", devices=2))
    memories = [memory.rows.tolist() for memory in task.memories.values()]
    unseen = [int((memory.rows[data.train_indices].sum(1) < 0.5).sum()) for memory in task.memories.values()]
    return memories, unseen, [p.double().sum().item() for p in task.parameters()]


@pytest.mark.parametrize("name", ["ELR", "ELRPlus"])
def test_two_processes_share_the_memory(name):
    first, second = on_two_ranks(_train_on_two, name)
    assert first == second
    assert not any(first[1])  # 1 - 0.7^2 = 0.51 after two visits, on whichever process
