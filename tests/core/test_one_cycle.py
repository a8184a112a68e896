"""The one cycle: torch's own numbers, momentum too, cycles that are longer than a stage, a second stage, resume."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.optim.lr_scheduler import ConstantLR, OneCycleLR, SequentialLR

from lightning_kd.core.one_cycle import OneCycle
from lightning_kd.core.optimization import tell_length
from tests.core.runs import rates_of


def followed(schedule, steps, optimizer=torch.optim.AdamW):
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


def followed_torch(length, pct_start):
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
def test_it_is_that_of_torch(length, share):
    found = followed(partial(OneCycle, total_steps=length, pct_start=share), length)
    assert_close(found, followed_torch(length, share))
    assert max(rate for rate, _ in found) == pytest.approx(0.3, rel=0.1)


def test_a_cycle_that_is_longer_than_the_training():
    assert_close(followed(partial(OneCycle, total_steps=10, stretch=5), 10), list(followed_torch(50, 0.2))[:10])


def test_a_second_stage_has_its_own_cycle():
    def plan(optimizer):
        schedule = OneCycle(optimizer, total_steps=30, stretch=[1, 2])
        schedule.set_second_stage(10)
        return schedule

    assert_close(followed(plan, 30), [*followed_torch(10, 0.2), *list(followed_torch(40, 0.2))[:20]])


def test_a_task_tells_of_its_second_stage():
    task = SimpleNamespace(trainer=object(), second_stage_begin=lambda unit: 10, schedule_length=lambda unit: 30)

    def told(schedule):
        tell_length(schedule, task, "step")
        return schedule

    two = [*followed_torch(10, 0.2), *followed_torch(20, 0.2)]
    for length in (None, 30):  # also of a length of its own
        assert_close(followed(lambda o, n=length: told(OneCycle(o, n)), 30), two)

    def later(optimizer):
        parts = [ConstantLR(optimizer, 0.5, 9), OneCycle(optimizer)]
        return told(SequentialLR(optimizer, parts, [4]))

    expected = [*followed_torch(6, 0.2), *followed_torch(20, 0.2)]
    found = [rate for rate, _ in followed(later, 30)[4:]]
    assert found == pytest.approx([rate for rate, _ in expected], rel=1e-6)


@pytest.mark.parametrize("length", [1, 2, 5])
def test_short_ones(length):
    found = followed(partial(OneCycle, total_steps=length), length + 2)
    assert found[0][0] == pytest.approx(0.3 / 25)
    assert found[-1][0] == pytest.approx(0.3 / 25e4)


def test_it_ends_with_the_training_and_other_optimizers_have_a_momentum_too():
    sgd = partial(torch.optim.SGD, momentum=0.9)
    assert_close(followed(partial(OneCycle, total_steps=20), 20, sgd), followed(partial(OneCycle, total_steps=20), 20))
    without = followed(partial(OneCycle, total_steps=20, cycle_momentum=False), 20, sgd)
    assert {momentum for _, momentum in without} == {0.9}
    assert rates_of(OneCycle, 3, lr_interval="step") == rates_of(
        partial(OneCycle, total_steps=12), 3, lr_interval="step"
    )
    with pytest.raises(ValueError, match=r"^cycle_momentum needs a momentum, Adagrad has none: give false"):
        OneCycle(torch.optim.Adagrad([torch.nn.Parameter(torch.zeros(1))]), total_steps=3)
