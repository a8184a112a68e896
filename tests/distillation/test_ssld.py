"""SSLD: its losses by worked numbers, and a training that needs no labels."""

import math

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_kd import SSLD
from lightning_kd.distillation.ssld import jensen_shannon_loss, symmetric_kl_loss

P, Q = (torch.tensor([row], dtype=torch.float64) for row in ([0.7, 0.2, 0.1], [0.5, 0.3, 0.2]))


def test_losses_give_worked_numbers():
    assert float(symmetric_kl_loss(P.log(), Q.log())) == pytest.approx(0.0885778, abs=1e-7)
    assert float(symmetric_kl_loss(Q.log(), P.log())) == pytest.approx(0.0885778, abs=1e-7)
    assert float(symmetric_kl_loss(P.log() + 5, P.log())) == pytest.approx(0, abs=1e-12)
    middle = (P + Q) / 2
    js = 0.5 * (P * (P / middle).log()).sum() + 0.5 * (Q * (Q / middle).log()).sum()
    assert float(jensen_shannon_loss(P.log(), Q.log())) == pytest.approx(float(js), abs=1e-12)
    # for close distributions symmetric_kl_loss is about four times jensen_shannon_loss
    close = (P + 1e-3 * (Q - P)).log()
    assert float(symmetric_kl_loss(close, P.log()) / jensen_shannon_loss(close, P.log())) == pytest.approx(4, rel=1e-3)


def test_symmetric_kl_loss_equals_the_official_code():
    """Elements times C, the mean over all of them, logarithms floored at 1e-12."""
    p, q = (torch.randn(5, 7, generator=torch.Generator().manual_seed(k), dtype=torch.float64) for k in (0, 1))
    ps, qs = p.softmax(1), q.softmax(1)
    forward, backward = qs * ((qs + 1e-12) / (ps + 1e-12)).log(), ps * ((ps + 1e-12) / (qs + 1e-12)).log()
    official = (7 * forward).mean() / 2 + (7 * backward).mean() / 2
    assert float(symmetric_kl_loss(p, q)) == pytest.approx(float(official), rel=1e-9)


@pytest.mark.parametrize("loss", [symmetric_kl_loss, jensen_shannon_loss])
def test_losses_are_finite_for_extreme_logits_and_float32_for_half(loss):
    student = torch.tensor([[3e38, -3e38, 0.0], [60.0, 0.0, -60.0]], requires_grad=True)
    value = loss(student, torch.tensor([[3e38, 0.0, -3e38], [-60.0, 0.0, 60.0]]))
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()
    assert loss(P.half().log(), Q.half().log()).dtype == torch.float32
    assert float(jensen_shannon_loss(student.detach(), -student)) <= math.log(2) + 1e-6
    teacher = Q.log().requires_grad_()
    loss(P.log().requires_grad_(), teacher).backward()
    assert teacher.grad is None


def trainer(**options):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    return L.Trainer(**{**quiet, "enable_model_summary": False, "max_epochs": 1, "num_sanity_val_steps": 0, **options})


def networks():
    torch.manual_seed(3)
    student = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 10)).double()
    return student, nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).double()


def samples(target):
    image = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return DataLoader(TensorDataset(image, target) if target is not None else image, 8)


def trained(target, **options):
    student, teacher = networks()
    task = SSLD(student, teacher, 10, input_shape=(1, 8, 8), **options).double()
    run = trainer(precision=64)
    run.fit(task, samples(target))
    return student.state_dict(), run.callback_metrics


def test_step_descends_the_gradient_of_symmetric_kl():
    student, teacher = networks()
    image = next(iter(samples(None)))
    expected, _ = networks()
    loss = symmetric_kl_loss(expected(image), teacher(image))
    loss.backward()
    task = SSLD(student, teacher, 10, input_shape=(1, 8, 8), optimizer=lambda p: torch.optim.SGD(p, lr=0.5)).double()
    run = trainer(precision=64, limit_train_batches=1)
    run.fit(task, samples(None))
    assert float(run.callback_metrics["train/loss"]) == pytest.approx(float(loss.detach()))
    for own, other in zip(student.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(own, other - 0.5 * other.grad)


def test_labels_are_optional_and_used_for_accuracy_alone():
    labels = torch.arange(32) % 10
    weights, metrics = trained(labels)
    for other in (labels.flip(0), torch.full((32,), -1), None):
        again, others = trained(other)
        assert all(torch.equal(value, again[key]) for key, value in weights.items())
        assert others["train/loss"] == metrics["train/loss"]
        assert ("train/acc" in others) == (other is not None and bool((other >= 0).any()))
    some = torch.where(torch.arange(32) % 2 == 0, labels, -1)
    student, _ = networks()
    run = trainer(precision=64)
    task = SSLD(student, networks()[1], 10, input_shape=(1, 8, 8), optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    run.fit(task.double(), samples(some))
    image = torch.cat(list(samples(None)))
    right = (networks()[0](image).argmax(1) == labels)[::2].double().mean()
    assert float(run.callback_metrics["train/acc"]) == pytest.approx(float(right))


def test_wrong_loss_ce_weight_and_targets_raise():
    student, teacher = networks()
    with pytest.raises(ValueError, match="loss must be 'symmetric_kl' or 'jensen_shannon', got 'js'"):
        SSLD(student, teacher, 10, input_shape=(1, 8, 8), loss="js")
    with pytest.raises(ValueError, match=r"ce_weight must be 0, as no label is learnt, got 0\.5"):
        SSLD(student, teacher, 10, input_shape=(1, 8, 8), ce_weight=0.5)
    with pytest.raises(ValueError, match="target must be between 0 and 9, got"):
        trained(torch.arange(32))
    with pytest.raises(ValueError, match="target must be between 0 and 9, got -2"):
        trained(torch.full((32,), -2))
