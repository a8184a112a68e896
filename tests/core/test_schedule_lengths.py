"""Schedules that end with the training: their length, inside other schedules, and after a resume."""

import math
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ChainedScheduler, ConstantLR, CosineAnnealingLR, LinearLR, SequentialLR
from torch.utils.data import DataLoader, IterableDataset

from lightning_kd.core import Classification
from lightning_kd.core.schedules import ConstantThenCosine, CosineAnnealing
from lightning_kd.noisy_labels import LateLinearLR
from tests.core.runs import loader, rates_of, sgd, trainer

SCHEDULES = {
    "cosine": CosineAnnealing,
    "constant, then cosine": partial(ConstantThenCosine, constant_epochs=1),
    "late linear": partial(LateLinearLR, start_epoch=1),
}
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


def cosine(length, epochs=None, eta_min=0.0):
    """The learning rates of a cosine from 0.1 that is ``length`` epochs long."""
    epochs = range(length) if epochs is None else epochs
    return [eta_min + (0.1 - eta_min) * (1 + math.cos(math.pi * epoch / length)) / 2 for epoch in epochs]


def rise_warnings(record):
    return [str(one.message) for one in record if "the learning rate goes from" in str(one.message)]


def test_a_cosine_is_as_long_as_the_training():
    assert rates_of(CosineAnnealing, 5) == rates_of(partial(CosineAnnealingLR, T_max=5), 5)
    assert rates_of(partial(CosineAnnealing, T_max=5, eta_min=0.01), 5) == rates_of(
        partial(CosineAnnealingLR, T_max=5, eta_min=0.01), 5
    )
    schedules = []

    def kept(optimizer):
        schedules.append(CosineAnnealing(optimizer))
        return schedules[-1]

    for limits, steps in (({}, 12), ({"max_steps": 7}, 7), ({"accumulate_grad_batches": 3}, 6)):
        rates_of(kept, 3, lr_interval="step", limits=limits)
        assert schedules[-1].T_max == steps
    rates_of(kept, -1, lr_interval="step", limits={"max_steps": 5})
    assert schedules[-1].T_max == 5


def test_a_cosine_after_a_constant_rate_ends_with_the_training():
    whole = rates_of(partial(ConstantThenCosine, constant_epochs=2), 6)
    assert whole == rates_of(partial(ConstantThenCosine, constant_epochs=2, cosine_epochs=4), 6)


# -- how long the training is ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epochs", "limits", "length"),
    [
        (20, {"max_steps": 12}, 3),  # of 4 steps each
        (20, {"max_steps": 10}, 3),
        (2, {"max_steps": 100}, 2),
        (-1, {"max_steps": 12}, 3),
        (None, {"max_steps": 12}, 3),
        (20, {"max_steps": 6, "accumulate_grad_batches": 2}, 3),
        (20, {"max_steps": 6, "limit_train_batches": 2}, 3),
    ],
)
def test_cosine_ends_where_max_steps_ends_the_training(epochs, limits, length):
    assert rates_of(CosineAnnealing, epochs, limits=limits) == pytest.approx(cosine(length))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(loader().dataset)


@pytest.mark.parametrize(
    ("epochs", "limits", "options", "message"),
    [
        (
            -1,
            {"max_time": {"seconds": 9}},
            {},
            "does not say how many epochs Classification trains: give max_epochs, or",
        ),
        (
            -1,
            {"max_time": {"seconds": 9}},
            {"lr_interval": "step"},
            "how many steps .* give lr_interval epoch with max_",
        ),
        (
            20,
            {"max_steps": 12},
            {},
            "max_epochs=20 with max_steps=12 does not .* give max_epochs without max_steps, or",
        ),
    ],
)
def test_unknown_length_of_the_training_raises(epochs, limits, options, message):
    task = Classification(nn.Linear(4, 3), 3, optimizer=sgd(), lr_scheduler=CosineAnnealing, **options)
    data = DataLoader(Stream(), batch_size=8)
    with pytest.raises(ValueError, match=f"^CosineAnnealing ends with the training, and .*{message}"):
        trainer(epochs, **limits).fit(task, data)


def test_schedule_with_its_own_length_needs_none_of_the_training():
    rates = rates_of(partial(CosineAnnealing, T_max=500), -1, limits={"max_time": {"seconds": 0.05}})
    assert rates[:2] == pytest.approx(cosine(500, range(len(rates[:2]))))


def test_length_below_one_raises():
    with pytest.raises(ValueError, match="T_max must be at least 1, got 0"):
        rates_of(partial(CosineAnnealing, T_max=0), 2)


@each_schedule
def test_stepping_a_schedule_without_length_raises(schedule):
    optimizer = sgd()(nn.Linear(4, 3).parameters())
    alone = schedule(optimizer)
    optimizer.step()
    with pytest.raises(ValueError, match=f"{type(alone).__name__} ends with the training, whose length is not set"):
        alone.step()


# -- inside other schedules ------------------------------------------------------------------------------------------


def after_a_warmup(optimizer, schedule=CosineAnnealing):
    return SequentialLR(optimizer, [LinearLR(optimizer, 0.1, total_iters=2), schedule(optimizer)], [2])


def test_schedule_in_a_sequence_takes_its_part_of_the_training():
    assert rates_of(after_a_warmup, 8) == pytest.approx([0.01, 0.055, *cosine(6)])
    late = partial(after_a_warmup, schedule=SCHEDULES["late linear"])
    assert rates_of(late, 7) == pytest.approx([0.01, 0.055, 0.1, 0.1, 0.075, 0.05, 0.025])

    def first(optimizer):
        return SequentialLR(optimizer, [CosineAnnealing(optimizer), ConstantLR(optimizer, 0.5, 9)], [4])

    assert rates_of(first, 6) == pytest.approx([*cosine(4), 0.05, 0.05])
    assert rates_of(after_a_warmup, 1) == pytest.approx([0.01])  # the training ends within the warm-up


def chain(optimizer):
    return ChainedScheduler([ConstantLR(optimizer, 0.5, 2), CosineAnnealing(optimizer)])


def test_cosine_in_a_chain_lasts_the_whole_training():
    whole = cosine(6)
    assert rates_of(chain, 6) == pytest.approx([whole[0] / 2, whole[1] / 2, *whole[2:]])


@pytest.mark.filterwarnings("ignore:.*the learning rate goes from")
@pytest.mark.parametrize(
    ("schedule", "stop", "epochs"),
    [(after_a_warmup, 0, 9), (after_a_warmup, 3, 9), (after_a_warmup, 3, 6), (chain, 0, 9), (chain, 3, 9)],
)
def test_resumed_sequence_or_chain_has_the_rates_of_a_whole_training(tmp_path, schedule, stop, epochs):
    path = str(tmp_path / "some.ckpt")
    rates_of(schedule, 6, save=path, stop=stop)
    assert rates_of(schedule, epochs, ckpt_path=path) == pytest.approx(rates_of(schedule, epochs)[stop + 1 :])


# -- resumed ---------------------------------------------------------------------------------------------------------


@each_schedule
@pytest.mark.parametrize("trained", [1, 3, 4])
@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_resume_with_another_length_has_the_rates_of_a_training_that_long(tmp_path, schedule, trained, interval):
    """Resumed from within, and from the end, of a training of 4 epochs."""
    path = str(tmp_path / "some.ckpt")
    first = rates_of(schedule, 4, save=path, stop=trained - 1, lr_interval=interval)
    assert len(first) == trained
    whole = rates_of(schedule, 7, lr_interval=interval)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        later = rates_of(schedule, 7, ckpt_path=path, lr_interval=interval)
    assert later == pytest.approx(whole[trained:])
    assert later[0] > 0.01
    assert later == sorted(later, reverse=True)
    if interval == "epoch":
        expected = (
            [f"from {first[-1]:.3g} in the last epoch trained up to {later[0]:.3g}"] if later[0] > first[-1] else []
        )
        assert len(rise_warnings(record)) == len(expected)
        assert all(sentence in found for sentence, found in zip(expected, rise_warnings(record), strict=True))
    else:
        (found,) = rise_warnings(record)
        assert f"in the last step trained up to {later[0]:.3g}" in found
    if trained < 3:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*the learning rate goes from")
            shorter = rates_of(schedule, 3, ckpt_path=path, lr_interval=interval)
        assert shorter == pytest.approx(rates_of(schedule, 3, lr_interval=interval)[trained:])


@pytest.mark.filterwarnings("ignore:.*the learning rate goes from")
@each_schedule
def test_resumed_schedule_equals_an_uninterrupted_one(tmp_path, schedule):
    path = str(tmp_path / "some.ckpt")
    whole = rates_of(schedule, 6)
    first = rates_of(schedule, 6, save=path, stop=2)
    assert first + rates_of(schedule, 6, ckpt_path=path) == whole
    # also where the resume made it longer
    longer = rates_of(schedule, 9, ckpt_path=path)
    begun = rates_of(schedule, 9, ckpt_path=path, save=path, stop=4)
    assert begun + rates_of(schedule, 9, ckpt_path=path) == longer


@pytest.mark.parametrize(("before", "now", "factor"), [(2, 6, 1.0), (3, 8, 0.5)])
def test_tensor_learning_rate_is_adapted_in_place_to_the_new_length(before, now, factor):
    """``factor`` is that of another schedule in a chain."""
    parameters = list(nn.Linear(4, 3).parameters())
    old, new = (torch.optim.Adam(parameters, lr=torch.tensor(0.1)) for _ in range(2))
    schedules = [CosineAnnealing(old), CosineAnnealing(new)]
    for schedule, length in zip(schedules, (before, now), strict=True):
        schedule.set_length(length)
    for _ in range(2):
        old.step()
        schedules[0].step()
    old.param_groups[0]["lr"].mul_(factor)
    new.load_state_dict(old.state_dict())
    rate = new.param_groups[0]["lr"]
    schedules[1].load_state_dict(schedules[0].state_dict())
    assert new.param_groups[0]["lr"] is rate  # a compiled step keeps this tensor
    expected = cosine(now)[2]
    assert rate.item() == pytest.approx(expected * factor)
    assert [float(value) for value in schedules[1].raised] == pytest.approx([cosine(before)[1], expected])


# -- warnings about another length -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (
            partial(CosineAnnealingLR, T_max=9),
            "CosineAnnealingLR has T_max 9, the training has 4 epochs, so it ends at",
        ),
        (partial(CosineAnnealing, T_max=1), "T_max 1, the training has 4 epochs, so it raises"),
        (partial(ConstantThenCosine, constant_epochs=2, cosine_epochs=4), r"constant_epochs \+ cosine_epochs 6"),
        (
            partial(after_a_warmup, schedule=partial(CosineAnnealingLR, T_max=4)),
            "T_max 4, the training has 2 epochs after the first 2, so it ends at",
        ),
    ],
)
@pytest.mark.parametrize(("epochs", "limits"), [(4, {}), (99, {"max_steps": 16})])
def test_schedule_of_another_length_than_the_training_warns(schedule, message, epochs, limits):
    with pytest.warns(UserWarning, match=message):
        rates_of(schedule, epochs, limits=limits)


@pytest.mark.parametrize(
    "schedule",
    [
        CosineAnnealing,
        partial(ConstantThenCosine, constant_epochs=0, cosine_epochs=1),
        partial(after_a_warmup, schedule=partial(CosineAnnealingLR, T_max=2)),
        None,
    ],
)
@pytest.mark.parametrize(("epochs", "limits"), [(4, {}), (99, {"max_steps": 16})])
def test_schedule_of_the_right_length_does_not_warn(schedule, epochs, limits):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*the training has")
        rates_of(schedule, epochs, limits=limits)
