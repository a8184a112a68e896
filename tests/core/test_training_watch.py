"""What a training is watched for, and the default optimizers."""

import warnings

import pytest
import torch
from torch import nn

from lightning_kd import KD
from lightning_kd.core import Classification, SemanticSegmentation
from lightning_kd.core.training_watch import TrainingWatch
from lightning_kd.data import ArrayDataModule
from lightning_kd.noisy_labels import CrossEntropy
from tests.core.runs import loader, sgd, trainer


def test_a_training_that_diverges_is_told_once():
    task = Classification(nn.Linear(4, 3), 3, optimizer=sgd(30.0))
    with pytest.warns(
        UserWarning, match=r"the training loss is .* that of guessing is 1\.1: the training diverges"
    ) as w:
        trainer(4).fit(task, loader(spread=5.0))
    assert sum("diverges" in str(one.message) for one in w) == 1
    assert "began at 30" in str(next(one.message for one in w if "diverges" in str(one.message)))


def test_a_validation_loss_out_of_all_proportion_is_told():
    class Wild(KD):
        def distillation_loss(self, student_logits, teacher_logits, target):
            return student_logits.sum() * 0

    task = Wild(nn.Linear(4, 3), nn.Linear(4, 3), 3, optimizer=sgd(30.0))
    with pytest.warns(UserWarning, match="the validation loss is .* diverges"):
        trainer(2).fit(task, loader(spread=5.0), loader(spread=50.0))


def test_a_loss_that_only_rises_is_told():
    watch, task = TrainingWatch(), Classification(nn.Linear(4, 3), 3)
    fitter = trainer(9)
    task.trainer = fitter
    fitter.optimizers = [torch.optim.SGD(task.parameters(), lr=0.1)]
    watch.on_train_start(fitter, task)
    for loss in (1.0, 0.9, 0.7, 0.8, 1.2):
        fitter.callback_metrics["train/loss"] = torch.tensor(loss)
        watch.on_train_epoch_start(fitter, task)
    fitter.callback_metrics["train/loss"] = torch.tensor(1.3)
    with pytest.warns(UserWarning, match="the training loss has risen to 1.3 in 3 epochs"):
        watch.on_train_epoch_start(fitter, task)


def test_what_learns_is_left_in_peace():
    data = ArrayDataModule("none.npz", kind="segmentation", fake=True, class_names=list("abcd"))
    tasks = (
        (Classification("cnn_tiny", 10), ArrayDataModule("n.npz", fake=True)),
        (SemanticSegmentation("fcn_tiny", 4), data),
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*diverges")
        for task, source in tasks:
            trainer(3).fit(task, source)


def optimizer_of(task):
    found = task.configure_optimizers()
    group = found.param_groups[0]
    return type(found).__name__, group["lr"], group["weight_decay"]


def test_default_optimizers(tmp_path):
    normed = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    plain = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3))
    assert optimizer_of(Classification(normed, 3)) == ("SGD", 0.05, 5e-4)
    assert optimizer_of(Classification(plain, 3)) == ("AdamW", 3e-4, 0.01)
    torch.save(normed.state_dict(), tmp_path / "some.pt")
    given = str(tmp_path / "some.pt")
    assert optimizer_of(Classification(normed, 3, weights=given)) == ("AdamW", 1e-4, 0.01)
    student = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    assert optimizer_of(KD(student, plain, 3, student_weights=given)) == ("AdamW", 1e-4, 0.01)
    assert optimizer_of(KD(nn.Linear(4, 3), normed, 3)) == ("AdamW", 3e-4, 0.01)  # the teacher is not trained
    # the other methods keep the choice of their papers
    assert optimizer_of(CrossEntropy(nn.Linear(4, 3), 3)) == ("SGD", 0.05, 5e-4)


def test_a_network_without_batch_norm_trains_by_default():
    torch.manual_seed(0)
    task = Classification("mlp_64", 10)
    fitter = trainer(3)
    fitter.fit(task, ArrayDataModule("none.npz", fake=True, batch_size=16))
    assert float(fitter.callback_metrics["train/acc"]) > 0.5
