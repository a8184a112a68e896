"""Logged metrics, random draws and own callbacks of a task."""

from functools import partial

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_kd import Classification, DigitsDataModule
from lightning_kd.core.seeding import EpochSeeding
from lightning_kd.core.training_watch import TrainingWatch
from tests.two_processes import on_two_ranks


def trainer_of(**options):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return L.Trainer(**{**quiet, "enable_model_summary": False, "accelerator": "cpu", **options})


def test_metrics_are_means_over_samples_not_over_batches():
    still = partial(torch.optim.SGD, lr=0.0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    task = Classification(network, 10, input_shape=(1, 8, 8), optimizer=still)
    image, target = torch.randn(32, 1, 8, 8), torch.arange(32) % 10
    image[30:] *= 50  # the small last batch is unlike the others
    loader = DataLoader(TensorDataset(image, target), batch_size=30)
    trainer = trainer_of(max_epochs=1)
    with torch.no_grad():
        logits = network(image)
    loss, accuracy = float(F.cross_entropy(logits, target)), float((logits.argmax(1) == target).float().mean())
    trainer.fit(task, loader, loader)
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    found |= trainer.test(task, loader, verbose=False)[0]
    for name in ("train", "val", "test"):
        assert found[f"{name}/loss"] == pytest.approx(loss, rel=1e-4)
        assert found[f"{name}/acc"] == pytest.approx(accuracy, rel=1e-4)
    of_batches = float(F.cross_entropy(logits[:30], target[:30]) + F.cross_entropy(logits[30:], target[30:])) / 2
    assert abs(of_batches - loss) > 0.5


class Drawing(Classification):
    drawn = ()

    def on_train_epoch_start(self):
        super().on_train_epoch_start()
        self.drawn = (*self.drawn, *(float(self.generator("mix", k).random()) for k in range(2)))


def _drawn(**options):
    L.seed_everything(0, verbose=False)
    task = Drawing("mlp_8", 10, input_shape=(1, 8, 8))
    trainer_of(max_epochs=2, **options).fit(task, DigitsDataModule(fake=True))
    return task.drawn


def _drawn_on_two():
    return _drawn(strategy="ddp", devices=2)


def test_draws_depend_on_epoch_pass_and_process():
    alone, (first, second) = _drawn(), on_two_ranks(_drawn_on_two)
    assert _drawn() == alone == first
    assert len({*first, *second}) == 8  # two epochs, passes and processes


class OwnSeeding(EpochSeeding):
    """A user's callback that replaces the one of the task."""


def test_users_callback_replaces_the_tasks_callback_of_its_kind():
    trainer = trainer_of(max_epochs=1, callbacks=[OwnSeeding()])
    trainer.fit(Classification("mlp_8", 10, input_shape=(1, 8, 8)), DigitsDataModule(fake=True))
    kinds = [type(c) for c in trainer.callbacks if isinstance(c, EpochSeeding | TrainingWatch)]
    assert kinds == [OwnSeeding, TrainingWatch]
