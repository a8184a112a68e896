"""Co-teaching as a task, and the schedule of its paper."""

import csv
import warnings

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_kd.noisy_labels import CoTeaching, LateLinearLR, coteaching, forget_rate
from tests.noisy_labels.runs import data_module, fitted, resumes_to_the_bit, trainer_of
from tests.two_processes import on_two_ranks

SGD = {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1)}


def test_fit_logs_metrics_and_writes_noisy_labels_csv(tmp_path):
    task, trainer = fitted(CoTeaching, noise_rate=0.4)
    data = trainer.datamodule
    assert trainer.global_step == 2 * 2 * len(data.loader("train", shuffle=True))  # each batch steps both optimizers
    for key in ("loss", "acc", "clean_auc", "pure_ratio", "memorised_wrong"):
        assert trainer.callback_metrics[f"train/{key}"].isfinite(), key
    first, second = (dict(network.named_parameters()) for network in task.networks)
    assert not any(torch.equal(first[name], second[name]) for name in first if "conv" in name)
    task.write_results(tmp_path)
    assert len(list(csv.DictReader((tmp_path / "noisy_labels.csv").open()))) == data.train_size
    trainer.test(task, datamodule=data, verbose=False)


def test_one_step_equals_the_algorithm():
    """Each network learns from the samples of smallest loss of the other, written out again."""
    L.seed_everything(0, verbose=False)
    task = CoTeaching("cnn_tiny", 10, input_shape=(1, 8, 8), noise_rate=0.5, ramp_epochs=1, channels_last=False, **SGD)
    data = data_module(batch_size=4096)
    before = []

    class StateRecorder(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            before.append(([{k: v.clone() for k, v in n.state_dict().items()} for n in task.networks], batch))

    trainer = trainer_of(max_epochs=2, callbacks=[StateRecorder()])
    trainer.fit(task, datamodule=data)
    (states, batch) = before[1]  # in epoch 1 half of the batch is dropped
    twins = []
    for state in states:
        twin = CoTeaching("cnn_tiny", 10, input_shape=(1, 8, 8), noise_rate=0.5).networks[0]
        twin.load_state_dict(state)
        twins.append(twin.train())
    losses = [F.cross_entropy(twin(batch.image), batch.target, reduction="none") for twin in twins]
    kept = [loss.argsort(stable=True)[: len(batch.target) // 2] for loss in losses]
    for k in range(2):
        losses[k][kept[1 - k]].mean().backward()
        for p, (name, trained) in zip(twins[k].parameters(), task.networks[k].named_parameters(), strict=True):
            torch.testing.assert_close(p - 0.1 * p.grad, trained, msg=name)
    right = (batch.extras["clean_target"] == batch.target).float()
    ratio = (right[kept[0]].mean() + right[kept[1]].mean()) / 2
    assert trainer.callback_metrics["train/pure_ratio"].item() == pytest.approx(ratio.item())


def test_pure_ratio_covers_all_samples_while_none_is_dropped():
    _, trainer = fitted(CoTeaching, trainer=trainer_of(max_epochs=1), noise_rate=0.4, exponent=50.0)
    data = trainer.datamodule
    assert data.train_size % data.batch_size == 0
    share = (data.train_clean == data.train_target)[data.train_indices].float().mean()
    assert trainer.callback_metrics["train/pure_ratio"].item() == pytest.approx(share.item())


def test_forget_rate_is_above_0_in_the_first_epoch(monkeypatch):
    """The official loop counts epochs from 1 and uses that epoch's rate."""
    rates = []
    real = coteaching._exchange
    monkeypatch.setattr(coteaching, "_exchange", lambda *args: rates.append(args[2]) or real(*args))
    fitted(CoTeaching, trainer=trainer_of(max_epochs=2), noise_rate=0.5, ramp_epochs=10)
    assert sorted(set(rates)) == pytest.approx([0.055556, 0.111111], abs=1e-6)


def test_without_clean_labels_there_is_no_pure_ratio():
    _, trainer = fitted(CoTeaching, data=data_module(noise=None), noise_rate=0.0)
    assert "train/pure_ratio" not in trainer.callback_metrics
    assert "train/clean_fraction" in trainer.callback_metrics


def test_batches_without_kept_samples_take_no_step():
    L.seed_everything(0, verbose=False)
    task = CoTeaching("cnn_tiny", 10, input_shape=(1, 8, 8), noise_rate=0.9, ramp_epochs=3)
    task_weights = []

    class Weights(L.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            task_weights.append([p.clone() for p in task.parameters()])

    trainer = trainer_of(max_epochs=3, callbacks=[Weights()])
    trainer.fit(task, datamodule=data_module(batch_size=8))
    assert trainer.global_step == 2 * len(trainer.datamodule.loader("train", shuffle=True))  # epoch 0 keeps half
    assert all(torch.equal(a, b) for a, b in zip(task_weights[1], task_weights[2], strict=True))


def test_trains_with_noise_rate_0_and_a_plain_dataloader():
    L.seed_everything(0, verbose=False)
    task = CoTeaching("cnn_tiny", 10, input_shape=(1, 8, 8), noise_rate=0.0)
    pairs = TensorDataset(torch.randn(16, 1, 8, 8), torch.arange(16) % 10)
    trainer = trainer_of()
    trainer.fit(task, DataLoader(pairs, batch_size=8))
    assert trainer.callback_metrics["train/loss"].isfinite()
    assert [forget_rate(t, task.noise_rate, task.ramp_epochs) for t in (0, 20)] == [0.0, 0.0]


def test_scores_and_probabilities_join_both_networks():
    task = CoTeaching("cnn_tiny", 10, input_shape=(1, 8, 8), noise_rate=0.2).eval()
    image = torch.randn(3, 1, 8, 8)
    logits = [network(image) for network in task.networks]
    scores, probabilities = task.scores_and_probabilities(image)
    torch.testing.assert_close(scores, logits[0] + logits[1])
    torch.testing.assert_close(probabilities, (logits[0].softmax(1) + logits[1].softmax(1)) / 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "noise_rate must be given, got None"),
        ({"noise_rate": 1.0}, "noise_rate must be at least 0 and below 1, got 1.0"),
        ({"noise_rate": 0.2, "ramp_epochs": 0}, "ramp_epochs must be at least 1, got 0"),
        ({"noise_rate": 0.2, "exponent": 0.0}, "exponent must be above 0, got 0.0"),
    ],
)
def test_wrong_arguments_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        CoTeaching("cnn_tiny", 10, input_shape=(1, 8, 8), **arguments)


def late(optimizer):
    return LateLinearLR(optimizer, start_epoch=2, epochs=4, late_beta1=0.1)


def test_resumes_to_the_bit(tmp_path):
    def adam(parameters):
        return torch.optim.Adam(parameters, lr=1e-3)

    assert resumes_to_the_bit(CoTeaching, tmp_path, noise_rate=0.4, ramp_epochs=3, optimizer=adam, lr_scheduler=late)


def test_late_linear_lr_decays_after_start_epoch_and_lowers_beta1():
    optimizer = torch.optim.Adam(nn.Linear(1, 1).parameters(), lr=0.1)
    scheduler = late(optimizer)
    seen = []
    for _ in range(6):
        seen.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["betas"][0]))
        optimizer.step()
        scheduler.step()
    rates, betas = zip(*seen, strict=True)
    assert rates == pytest.approx([0.1, 0.1, 0.1, 0.05, 0.0, 0.0])
    assert betas == (0.9, 0.9, 0.1, 0.1, 0.1, 0.1)
    with pytest.raises(ValueError, match="start_epoch must be below epochs=4, got 4"):
        LateLinearLR(optimizer, start_epoch=4, epochs=4)


def test_late_linear_lr_without_epochs_takes_the_length_of_the_training():
    rates = []
    for options in ({"epochs": 5}, {}):
        optimizer = torch.optim.Adam(nn.Linear(1, 1).parameters(), lr=0.1)
        scheduler = LateLinearLR(optimizer, 2, **options)
        scheduler.set_length(5)
        rates.append([])
        for _ in range(5):
            rates[-1].append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
    assert rates[0] == rates[1]


def test_test_accuracy_is_logged_for_each_network_and_for_both():
    task, trainer = fitted(CoTeaching, noise_rate=0.2)
    (found,) = trainer.test(task, datamodule=trainer.datamodule, verbose=False)
    data, right = trainer.datamodule, [0, 0, 0]
    task.eval()
    for batch in data.test_dataloader():
        both = [network(batch.image) for network in task.networks]
        for k, logits in enumerate([*both, both[0] + both[1]]):
            right[k] += int((logits.argmax(1) == batch.target).sum())
    share = [count / data.test_size for count in right]
    assert [found["test/acc_1"], found["test/acc_2"], found["test/acc"]] == pytest.approx(share)
    assert share[0] != share[1]


def _train_on_two():
    warnings.simplefilter("ignore")
    data = data_module(batch_size=16)
    _, trainer = fitted(CoTeaching, data, trainer=trainer_of(max_epochs=3, strategy="ddp", devices=2), noise_rate=0.4)
    weights = [p.double().sum().item() for p in trainer.lightning_module.parameters()]
    return trainer.global_step, weights, trainer.callback_metrics["train/pure_ratio"].item()


def test_two_processes_have_equal_weights_steps_and_pure_ratio():
    first, second = on_two_ranks(_train_on_two)
    assert first == second
    assert first[0] == 3 * 2 * len(data_module().loader("train", shuffle=True))
