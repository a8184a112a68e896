"""Warnings about a training that diverges, and the default optimizers."""

import warnings

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn

from lightning_kd import KD
from lightning_kd.core import Classification, SemanticSegmentation
from lightning_kd.core.training_watch import TrainingWatch
from lightning_kd.data import ArrayDataModule
from lightning_kd.noisy_labels import CrossEntropy
from tests.core.runs import loader, sgd, trainer


def test_diverging_training_warns_once():
    task = Classification(nn.Linear(4, 3), 3, optimizer=sgd(30.0))
    with pytest.warns(
        UserWarning, match=r"the training loss is .* that of guessing is 1\.1: the training diverges"
    ) as w:
        trainer(4).fit(task, loader(spread=5.0))
    assert sum("diverges" in str(one.message) for one in w) == 1
    assert "began at 30" in str(next(one.message for one in w if "diverges" in str(one.message)))


def warnings_of(losses, task=None, optimizer=None):
    """The warnings after epochs with these training and validation losses, ``None`` for no validation."""
    watch, task, fitter = TrainingWatch(), task or Classification(nn.Linear(4, 3), 3, optimizer=sgd()), trainer(9)
    task.trainer = fitter
    fitter.optimizers = [optimizer or torch.optim.SGD(task.parameters(), lr=0.1)]
    watch.on_train_start(fitter, task)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        for train, val in losses:
            fitter.callback_metrics["train/loss"] = torch.tensor(train)
            if val is not None:
                fitter.callback_metrics["val/loss"] = torch.tensor(val)
                watch.on_validation_end(fitter, task)
            watch.on_train_epoch_start(fitter, task)
    return [str(one.message) for one in record]


def test_training_loss_that_rises_for_three_epochs_warns():
    losses = [(loss, 0.5) for loss in (1.0, 0.9, 0.7, 0.8, 1.2)]
    assert warnings_of(losses) == []
    (found,) = warnings_of([*losses, (1.3, 0.5)])
    assert "the training loss has risen to 1.3 in 3 epochs" in found


@pytest.mark.parametrize(
    ("losses", "plain", "message"),
    [
        ([(1.2, 0.5), (8.6, 0.7)], True, "the training loss is 8.6 after"),
        ([(60.0, 1.5), (1.7, 1.2), (1.12, 1.1), (1.15, 1.1)], True, "the training loss was 60 and stays at 1.15"),
        ([(60.0, 1.5), (25.0, 1.5), (28.0, 1.5)], True, "the training loss is 28 after"),
        ([(0.9, 12.0), (0.1, 68.0)], True, "the validation loss is 68 after"),
        ([(0.9, 12.0), (0.1, 68.0)], False, "the validation loss is 68 after"),
        # losses of unscaled inputs begin far above guessing, but fall; one falls steeply below guessing
        ([(7.1, 5.0), (2.9, 2.0), (1.2, 0.9)], True, None),
        ([(2.9, 20.0), (2.8, 19.0), (2.7, 18.0), (2.6, 17.0)], True, None),
        ([(30.0, 20.0), (1.15, 1.12), (1.05, 1.0)], True, None),
        ([(1.0, 90.0), (0.8, 12.0), (0.7, 14.0)], True, None),
        # no warning for another loss than that of the problem, nor for an epoch without validation
        ([(7.0, 0.5), (7.1, 0.5)], False, None),
        ([(1.0, 90.0), (0.8, None), (0.7, None)], True, None),
        ([(7.0, 0.5)], True, None),
    ],
)
def test_losses_far_above_guessing_warn_but_falling_ones_do_not(losses, plain, message):
    task = Classification(nn.Linear(4, 3), 3, optimizer=sgd())
    task.loss_is_plain = plain
    found = warnings_of(losses, task)
    assert len(found) == (message is not None)
    assert all(message in sentence and "the training diverges" in sentence for sentence in found)


def test_suggested_optimizer_differs_from_the_one_in_use():
    diverging = [(2.0, 0.5), (9.0, 0.5)]
    task = Classification(nn.Linear(4, 3), 3)
    (found,) = warnings_of(diverging, task, task.configure_optimizers())
    assert found.endswith("such as --model.optimizer AdamW --model.optimizer.lr 3e-05")
    (found,) = warnings_of(diverging)
    assert found.endswith("such as --model.optimizer.lr 0.01, or --model.optimizer AdamW --model.optimizer.lr 3e-4")
    norm = Classification(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), 3)
    (found,) = warnings_of(diverging, norm, norm.configure_optimizers())
    assert "such as --model.optimizer SGD --model.optimizer.lr 0.005, or --model.optimizer AdamW" in found


def test_unscaled_features_train_without_warning(tmp_path):
    rng = np.random.default_rng(0)
    target = rng.integers(0, 2, 400)
    feature = (rng.normal(size=(400, 10)) * 30 + target[:, None] * 60).astype(np.float32)
    np.savez(tmp_path / "some.npz", feature=feature, target=target)
    fitter = trainer(6)
    L.seed_everything(0, verbose=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*diverges")
        data = ArrayDataModule(str(tmp_path / "some.npz"), batch_size=32)
        fitter.fit(Classification("mlp_64", 2, input_shape=(10,)), data)
    assert float(fitter.callback_metrics["train/acc"]) > 0.8


def test_successful_trainings_do_not_warn():
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


def test_default_optimizer_depends_on_batch_norm_and_starting_weights(tmp_path):
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


def test_default_optimizer_trains_a_network_without_batch_norm():
    torch.manual_seed(0)
    task = Classification("mlp_64", 10)
    fitter = trainer(3)
    fitter.fit(task, ArrayDataModule("none.npz", fake=True, batch_size=16))
    assert float(fitter.callback_metrics["train/acc"]) > 0.5
