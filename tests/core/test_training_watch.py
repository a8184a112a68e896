"""What a training is watched for, the default optimizers, and schedules as long as the training."""

import warnings
from functools import partial

import lightning as L
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

from lightning_kd import KD
from lightning_kd.core import Classification, SemanticSegmentation
from lightning_kd.core.schedules import ConstantThenCosine, CosineAnnealing
from lightning_kd.core.training_watch import TrainingWatch
from lightning_kd.data import ArrayDataModule
from lightning_kd.noisy_labels import CrossEntropy


class Rates(L.Callback):
    def __init__(self):
        self.rates = []

    def on_train_epoch_start(self, trainer, pl_module):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def trainer(epochs, *callbacks, **options):
    return L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def loader(count=32, spread=1.0):
    generator = torch.Generator().manual_seed(0)
    image = spread * torch.randn(count, 4, generator=generator)
    return DataLoader(TensorDataset(image, torch.randint(0, 3, (count,), generator=generator)), batch_size=8)


def sgd(lr=0.1):
    return partial(torch.optim.SGD, lr=lr)


def rates_of(schedule, epochs, ckpt_path=None, save=None, **options):
    seen = Rates()
    task = Classification(nn.Linear(4, 3), 3, optimizer=sgd(), lr_scheduler=schedule, **options)
    fitter = trainer(epochs, seen)
    fitter.fit(task, loader(), ckpt_path=ckpt_path, weights_only=True)
    if save is not None:
        fitter.save_checkpoint(save)
    return seen.rates


def test_a_cosine_is_as_long_as_the_training():
    assert rates_of(CosineAnnealing, 5) == rates_of(partial(CosineAnnealingLR, T_max=5), 5)
    assert rates_of(partial(CosineAnnealing, T_max=5, eta_min=0.01), 5) == rates_of(
        partial(CosineAnnealingLR, T_max=5, eta_min=0.01), 5
    )
    schedules = []

    def kept(optimizer):
        schedules.append(CosineAnnealing(optimizer))
        return schedules[0]

    rates_of(kept, 3, lr_interval="step")
    assert schedules[0].T_max == 12  # four batches an epoch


def test_a_cosine_after_a_constant_rate_ends_with_the_training():
    whole = rates_of(partial(ConstantThenCosine, constant_epochs=2), 6)
    assert whole == rates_of(partial(ConstantThenCosine, constant_epochs=2, cosine_epochs=4), 6)


def test_a_training_that_is_made_longer_goes_down_to_the_end(tmp_path):
    path = str(tmp_path / "some.ckpt")
    first = rates_of(CosineAnnealing, 4, save=path)
    later = rates_of(CosineAnnealing, 8, ckpt_path=path)
    assert first == sorted(first, reverse=True)
    assert first[-1] > later[0]
    assert later == sorted(later, reverse=True)
    assert len(later) == 4


def test_a_resumed_cosine_is_the_undisturbed_one(tmp_path):
    path = str(tmp_path / "some.ckpt")
    whole = rates_of(CosineAnnealing, 6)

    class Stop(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = trainer.current_epoch == 2

    seen = Rates()
    fitter = trainer(6, seen, Stop())
    fitter.fit(Classification(nn.Linear(4, 3), 3, optimizer=sgd(), lr_scheduler=CosineAnnealing), loader())
    fitter.save_checkpoint(path)
    assert seen.rates + rates_of(CosineAnnealing, 6, ckpt_path=path) == whole


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (
            partial(CosineAnnealingLR, T_max=9),
            "CosineAnnealingLR has T_max 9, the training has 2 epochs, so it ends at",
        ),
        (partial(CosineAnnealing, T_max=1), "T_max 1, the training has 2 epochs, so it raises"),
        (partial(ConstantThenCosine, constant_epochs=2, cosine_epochs=2), r"constant_epochs \+ cosine_epochs 4"),
    ],
)
def test_a_schedule_of_another_length_is_told(schedule, message):
    with pytest.warns(UserWarning, match=message):
        rates_of(schedule, 2)


@pytest.mark.parametrize(
    "schedule",
    [CosineAnnealing, partial(ConstantThenCosine, constant_epochs=0, cosine_epochs=1), None],
)
def test_a_schedule_of_the_right_length_is_not(schedule):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*the training has")
        rates_of(schedule, 2)


def test_a_cosine_without_a_length():
    task = Classification(nn.Linear(4, 3), 3, optimizer=sgd(), lr_scheduler=CosineAnnealing)
    with pytest.raises(ValueError, match="T_max is missing, and max_epochs=-1"):
        trainer(-1, max_steps=3).fit(task, loader())
    with pytest.raises(ValueError, match="T_max must be at least 1, got 0"):
        rates_of(partial(CosineAnnealing, T_max=0), 2)


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
