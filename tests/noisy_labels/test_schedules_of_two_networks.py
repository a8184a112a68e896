"""Schedules that end with the training, where two networks have a scheduler each."""

import math
from functools import partial

import lightning as L
import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

from lightning_kd.core.schedules import CosineAnnealing
from lightning_kd.noisy_labels import DPC, CoTeaching, DivideMix, ELRPlus
from tests.noisy_labels.runs import data_module, fitted, trainer_of

ARGUMENTS = {ELRPlus: {}, CoTeaching: {"noise_rate": 0.2}, DivideMix: {"warmup_epochs": 1}, DPC: {"warmup_epochs": 1}}


class Rates(L.Callback):
    def __init__(self):
        self.rates = []

    def on_train_epoch_start(self, trainer, pl_module):
        self.rates.append([optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizers])

    on_train_end = on_train_epoch_start


def rates_of(method, schedule=CosineAnnealing, lr_interval="step", **limits):
    seen = Rates()
    options = {**ARGUMENTS[method], "optimizer": partial(torch.optim.SGD, lr=0.1)}
    trainer = trainer_of(**{"max_epochs": 4, "callbacks": [seen], **limits})
    fitted(method, trainer=trainer, lr_scheduler=schedule, lr_interval=lr_interval, **options)
    return seen.rates


def cosine(length):
    return [pytest.approx([0.05 * (1 + math.cos(math.pi * done / length))] * 2) for done in range(length + 1)]


@pytest.mark.parametrize("method", [ELRPlus, CoTeaching])
def test_each_network_goes_through_the_whole_cosine(method):
    assert rates_of(method) == cosine(4)


@pytest.mark.parametrize("method", [ELRPlus, CoTeaching])
def test_max_steps_counts_the_steps_of_both_networks(method):
    data = data_module()
    data.setup()
    steps = 2 * len(data.loader("train", shuffle=True))  # per epoch
    for interval in ("epoch", "step"):
        *rates, end = rates_of(method, lr_interval=interval, max_epochs=9, max_steps=3 * steps)
        assert rates[:3] == cosine(3)[:3]
        if interval == "step":
            assert end == pytest.approx([0, 0], abs=1e-9)


@pytest.mark.parametrize("method", [DivideMix, DPC])
def test_cosine_per_step_raises_where_the_split_decides_the_steps(method):
    said = f"CosineAnnealing ends with the training, .* say how many steps {method.__name__} trains: give lr_interval e"
    with pytest.raises(ValueError, match=said):
        rates_of(method)
    with pytest.raises(ValueError, match=said):
        rates_of(method, max_epochs=-1, max_steps=9)
    with pytest.raises(
        ValueError, match=f"how many epochs {method.__name__} trains: give max_epochs without max_steps"
    ):
        rates_of(method, lr_interval="epoch", max_steps=9)
    assert len(rates_of(method, partial(CosineAnnealingLR, T_max=9), max_epochs=1)) == 2
    assert len(rates_of(method, lr_interval="epoch", fast_dev_run=True)) == 2
