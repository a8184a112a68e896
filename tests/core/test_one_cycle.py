"""The one-cycle schedule: equal to torch's, with momentum, stretched cycles and a second stage."""

from functools import partial
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ConstantLR, OneCycleLR, SequentialLR

from lightning_kd.core import Classification
from lightning_kd.core.one_cycle import OneCycle
from lightning_kd.core.optimization import tell_length
from tests.core.runs import loader, rates_of, trainer


def rates_and_momenta(schedule, steps, optimizer=torch.optim.AdamW):
    weight = torch.nn.Parameter(torch.zeros(1))
    one = optimizer([weight], lr=0.3)
    plan = schedule(one)
    found = []
    for _ in range(steps):
        group = one.param_groups[0]
        found.append((group["lr"], group["betas"][0] if "betas" in group else group["momentum"]))
        one.step()
        plan.step()
    return found


def rates_and_momenta_of_torch(length, pct_start):
    weight = torch.nn.Parameter(torch.zeros(1))
    one = torch.optim.AdamW([weight], lr=0.3)
    plan = OneCycleLR(one, max_lr=0.3, total_steps=length, pct_start=pct_start)
    for step in range(length):
        yield one.param_groups[0]["lr"], one.param_groups[0]["betas"][0]
        if step < length - 1:
            one.step()
            plan.step()


def assert_close(found, expected):
    torch.testing.assert_close(torch.tensor(found), torch.tensor(list(expected)), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(("length", "share"), [(50, 0.2), (33, 0.3), (7, 0.5)])
def test_one_cycle_equals_torchs(length, share):
    found = rates_and_momenta(partial(OneCycle, total_steps=length, pct_start=share), length)
    assert_close(found, rates_and_momenta_of_torch(length, share))
    assert max(rate for rate, _ in found) == pytest.approx(0.3, rel=0.1)


def test_stretched_cycle_is_cut_at_the_end_of_training():
    assert_close(
        rates_and_momenta(partial(OneCycle, total_steps=10, stretch=5), 10),
        list(rates_and_momenta_of_torch(50, 0.2))[:10],
    )


def test_a_second_stage_has_its_own_cycle():
    def plan(optimizer):
        schedule = OneCycle(optimizer, total_steps=30, stretch=[1, 2])
        schedule.set_second_stage(10)
        return schedule

    assert_close(
        rates_and_momenta(plan, 30),
        [*rates_and_momenta_of_torch(10, 0.2), *list(rates_and_momenta_of_torch(40, 0.2))[:20]],
    )


def test_second_stage_is_taken_from_the_task():
    task = SimpleNamespace(trainer=object(), second_stage_begin=lambda unit: 10, schedule_length=lambda unit: 30)

    def with_task_length(schedule):
        tell_length(schedule, task, "step")
        return schedule

    two = [*rates_and_momenta_of_torch(10, 0.2), *rates_and_momenta_of_torch(20, 0.2)]
    for length in (None, 30):  # also with total_steps given
        assert_close(rates_and_momenta(lambda o, n=length: with_task_length(OneCycle(o, n)), 30), two)

    def later(optimizer):
        parts = [ConstantLR(optimizer, 0.5, 9), OneCycle(optimizer)]
        return with_task_length(SequentialLR(optimizer, parts, [4]))

    expected = [*rates_and_momenta_of_torch(6, 0.2), *rates_and_momenta_of_torch(20, 0.2)]
    found = [rate for rate, _ in rates_and_momenta(later, 30)[4:]]
    assert found == pytest.approx([rate for rate, _ in expected], rel=1e-6)


@pytest.mark.parametrize("length", [1, 2, 5])
def test_short_cycles_start_and_end_at_the_right_rates(length):
    found = rates_and_momenta(partial(OneCycle, total_steps=length), length + 2)
    assert found[0][0] == pytest.approx(0.3 / 25)
    assert found[-1][0] == pytest.approx(0.3 / 25e4)


def test_one_cycle_cycles_sgd_momentum_and_takes_the_training_length():
    sgd = partial(torch.optim.SGD, momentum=0.9)
    assert_close(
        rates_and_momenta(partial(OneCycle, total_steps=20), 20, sgd),
        rates_and_momenta(partial(OneCycle, total_steps=20), 20),
    )
    without = rates_and_momenta(partial(OneCycle, total_steps=20, cycle_momentum=False), 20, sgd)
    assert {momentum for _, momentum in without} == {0.9}
    assert rates_of(OneCycle, 3, lr_interval="step") == rates_of(
        partial(OneCycle, total_steps=12), 3, lr_interval="step"
    )
    with pytest.raises(ValueError, match=r"^cycle_momentum needs a momentum, Adagrad has none: give false"):
        OneCycle(torch.optim.Adagrad([torch.nn.Parameter(torch.zeros(1))]), total_steps=3)


class Watched(L.Callback):
    """Records rate and momentum of each step, and ends the training after ``last`` epochs."""

    def __init__(self, last=None):
        self.seen, self.last = [], last

    def on_train_batch_start(self, trainer, *args):
        group = trainer.optimizers[0].param_groups[0]
        self.seen.append((group["lr"], group["betas"][0]))

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop |= trainer.current_epoch + 1 == self.last


def watched_fit(epochs, last=None, save=None, ckpt_path=None):
    torch.manual_seed(0)
    adam = partial(torch.optim.AdamW, lr=0.3)
    task = Classification(nn.Linear(4, 3), 3, optimizer=adam, lr_scheduler=OneCycle, lr_interval="step")
    watch = Watched(last)
    fitter = trainer(epochs, watch)
    fitter.fit(task, loader(), ckpt_path=ckpt_path, weights_only=True)
    if save:
        fitter.save_checkpoint(save)
    return watch.seen, task.state_dict()


@pytest.mark.filterwarnings("ignore:.*the learning rate goes from")
@pytest.mark.parametrize("last", [1, 2])
def test_resumed_cycle_equals_an_uninterrupted_one(tmp_path, last):
    """Of 4 epochs of 4 steps each."""
    path = str(tmp_path / "some.ckpt")
    whole, weights = watched_fit(4)
    first, _ = watched_fit(4, last, save=path)
    later, resumed = watched_fit(4, ckpt_path=path)
    assert len(first) == 4 * last
    assert first + later == whole
    assert all(torch.equal(value, resumed[name]) for name, value in weights.items())
    longer, _ = watched_fit(7, ckpt_path=path)  # has the rates and momenta of a training that long
    assert_close(longer, watched_fit(7)[0][4 * last :])
