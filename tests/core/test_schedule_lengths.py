"""Schedules that end with the training: how long that is, in compositions, and after a resume with another length."""

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

TIED = {
    "cosine": CosineAnnealing,
    "constant, then cosine": partial(ConstantThenCosine, constant_epochs=1),
    "late linear": partial(LateLinearLR, start_epoch=1),
}
each = pytest.mark.parametrize("schedule", TIED.values(), ids=TIED)


def cosine(length, epochs=None, eta_min=0.0):
    """The rates of a whole cosine from 0.1."""
    epochs = range(length) if epochs is None else epochs
    return [eta_min + (0.1 - eta_min) * (1 + math.cos(math.pi * epoch / length)) / 2 for epoch in epochs]


def rises(record):
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
def test_a_training_that_steps_end(epochs, limits, length):
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
def test_a_length_that_nobody_knows(epochs, limits, options, message):
    task = Classification(nn.Linear(4, 3), 3, optimizer=sgd(), lr_scheduler=CosineAnnealing, **options)
    data = DataLoader(Stream(), batch_size=8)
    with pytest.raises(ValueError, match=f"^CosineAnnealing ends with the training, and .*{message}"):
        trainer(epochs, **limits).fit(task, data)


def test_a_schedule_of_its_own_length_needs_none():
    rates = rates_of(partial(CosineAnnealing, T_max=500), -1, limits={"max_time": {"seconds": 0.05}})
    assert rates[:2] == pytest.approx(cosine(500, range(len(rates[:2]))))


def test_a_length_below_one_is_refused():
    with pytest.raises(ValueError, match="T_max must be at least 1, got 0"):
        rates_of(partial(CosineAnnealing, T_max=0), 2)


@each
def test_a_schedule_that_was_told_no_length_says_so(schedule):
    optimizer = sgd()(nn.Linear(4, 3).parameters())
    alone = schedule(optimizer)
    optimizer.step()
    with pytest.raises(ValueError, match=f"{type(alone).__name__} ends with the training, whose length is not set"):
        alone.step()


# -- inside others ---------------------------------------------------------------------------------------------------


def after_a_warmup(optimizer, schedule=CosineAnnealing):
    return SequentialLR(optimizer, [LinearLR(optimizer, 0.1, total_iters=2), schedule(optimizer)], [2])


def test_inside_a_sequence():
    assert rates_of(after_a_warmup, 8) == pytest.approx([0.01, 0.055, *cosine(6)])
    late = partial(after_a_warmup, schedule=TIED["late linear"])
    assert rates_of(late, 7) == pytest.approx([0.01, 0.055, 0.1, 0.1, 0.075, 0.05, 0.025])

    def first(optimizer):
        return SequentialLR(optimizer, [CosineAnnealing(optimizer), ConstantLR(optimizer, 0.5, 9)], [4])

    assert rates_of(first, 6) == pytest.approx([*cosine(4), 0.05, 0.05])
    assert rates_of(after_a_warmup, 1) == pytest.approx([0.01])  # ends before it begins


def chain(optimizer):
    return ChainedScheduler([ConstantLR(optimizer, 0.5, 2), CosineAnnealing(optimizer)])


def test_inside_a_chain():
    whole = cosine(6)
    assert rates_of(chain, 6) == pytest.approx([whole[0] / 2, whole[1] / 2, *whole[2:]])


@pytest.mark.filterwarnings("ignore:.*the learning rate goes from")
@pytest.mark.parametrize(
    ("schedule", "stop", "epochs"),
    [(after_a_warmup, 0, 9), (after_a_warmup, 3, 9), (after_a_warmup, 3, 6), (chain, 0, 9), (chain, 3, 9)],
)
def test_a_resumed_sequence_or_chain(tmp_path, schedule, stop, epochs):
    path = str(tmp_path / "some.ckpt")
    rates_of(schedule, 6, save=path, stop=stop)
    assert rates_of(schedule, epochs, ckpt_path=path) == pytest.approx(rates_of(schedule, epochs)[stop + 1 :])


# -- resumed ---------------------------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("trained", [1, 3, 4])
@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_a_resume_of_another_length_goes_on_as_a_whole_training_of_it(tmp_path, schedule, trained, interval):
    """In the midst, and after the end, of a training of 4 epochs."""
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
        told = [f"from {first[-1]:.3g} in the last epoch trained up to {later[0]:.3g}"] if later[0] > first[-1] else []
        assert len(rises(record)) == len(told)
        assert all(sentence in found for sentence, found in zip(told, rises(record), strict=True))
    if trained < 3:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*the learning rate goes from")
            shorter = rates_of(schedule, 3, ckpt_path=path, lr_interval=interval)
        assert shorter == pytest.approx(rates_of(schedule, 3, lr_interval=interval)[trained:])


@pytest.mark.filterwarnings("ignore:.*the learning rate goes from")
@each
def test_a_resumed_schedule_is_the_undisturbed_one(tmp_path, schedule):
    path = str(tmp_path / "some.ckpt")
    whole = rates_of(schedule, 6)
    first = rates_of(schedule, 6, save=path, stop=2)
    assert first + rates_of(schedule, 6, ckpt_path=path) == whole
    # one that was made longer, too
    longer = rates_of(schedule, 9, ckpt_path=path)
    begun = rates_of(schedule, 9, ckpt_path=path, save=path, stop=4)
    assert begun + rates_of(schedule, 9, ckpt_path=path) == longer


def test_a_rate_that_is_a_tensor_is_stretched_in_place():
    parameters = list(nn.Linear(4, 3).parameters())
    old, new = (torch.optim.Adam(parameters, lr=torch.tensor(0.1)) for _ in range(2))
    schedules = [CosineAnnealing(old), CosineAnnealing(new)]
    for schedule, length in zip(schedules, (2, 4), strict=True):
        schedule.set_length(length)
    for _ in range(2):
        old.step()
        schedules[0].step()
    rate = new.param_groups[0]["lr"]
    new.load_state_dict(old.state_dict())
    schedules[1].load_state_dict(schedules[0].state_dict())
    assert new.param_groups[0]["lr"].item() == pytest.approx(0.05)
    assert isinstance(rate, torch.Tensor)


# -- another length is told ------------------------------------------------------------------------------------------


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
def test_a_schedule_of_another_length_is_told(schedule, message, epochs, limits):
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
def test_a_schedule_of_the_right_length_is_not(schedule, epochs, limits):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*the training has")
        rates_of(schedule, epochs, limits=limits)
