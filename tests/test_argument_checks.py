"""Every class that is built from a config refuses numbers that are none, in one sentence that names the argument."""

import inspect
import math
import types
import typing

import lightning as L
import numpy as np
import pytest
import torch

import lightning_kd
from lightning_kd import callbacks, core, data
from lightning_kd.argument_checks import check_numbers
from lightning_kd.core import schedules
from lightning_kd.core.registry import family_packages
from lightning_kd.data import LabelNoise

NETWORK = {"num_classes": 4, "input_shape": (1, 8, 8)}
# what the classes cannot be built without, by the names of their arguments
NEEDED = {
    "network": "cnn_tiny",
    "student": "cnn_tiny",
    "teacher": "cnn_tiny",
    "teacher_weights": "random",
    "rate": 0.3,
    "labels": "worst",
    "matrix": [[1.0, 0.0], [0.0, 1.0]],
    "path": "none.npz",
    "root": "none",
    "base_optimizer": torch.optim.SGD,
    "constant_epochs": 3,
    "start_epoch": 3,
    "noise_rate": 0.2,
    "problem": lightning_kd.SingleLabel(4),
}
OTHERS = {  # what some classes take besides
    data.OpenSetDataModule: {"known_classes": 4, "initial_count": 2},
    data.CIFAR100DataModule: {"labels": "fine"},
    schedules.ConstantThenCosine: {"cosine_epochs": 2},
    lightning_kd.RDD: {"student": "fcn_tiny", "teacher": "fcn_tiny"},
}
BELOW_0 = {"kurtosis_threshold", "last_epoch", "log_zero", "z_b"}  # may be
LIMITED = {"label_smoothing": 1.0, "rate": 1.1, "noise_rate": 1.0, "momentum": 1.0, "clip": 0.5, "late_beta1": 1.0}
STATISTICS = ("mean", "std", "teacher_mean", "teacher_std")


def find_classes():
    packages = [*family_packages(), core, data, callbacks, schedules]
    found = {getattr(package, name) for package in packages for name in vars(package) if not name.startswith("_")}
    kinds = (
        *(L.LightningModule, L.LightningDataModule, L.Callback, LabelNoise),
        *(torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler),
    )
    return sorted(
        {
            cls
            for cls in found
            if inspect.isclass(cls)
            and issubclass(cls, kinds)
            and cls.__module__.startswith("lightning_kd")
            and not inspect.isabstract(cls)
            and not cls.__name__.endswith("Task")
        }
        - {data.ClassificationDataModule, data.LabelledDataModule, schedules.TiedSchedule},
        key=lambda cls: cls.__name__,
    )


def parameters(cls):
    """All arguments with their types, those of ``kwargs`` too."""
    found = {}
    for base in reversed(cls.__mro__):
        if "__init__" in vars(base) and base.__module__.startswith("lightning_kd"):
            known = inspect.signature(base.__init__).parameters
            if not any(p.kind is p.VAR_KEYWORD for p in known.values()):
                found = {}  # hands on what it likes
            hints = typing.get_type_hints(base.__init__)
            found |= {name: hints.get(name) for name in known if name not in ("self", "kwargs")}
    return found


def numbers(cls):
    for name, kind in parameters(cls).items():
        kinds = set(typing.get_args(kind)) if typing.get_origin(kind) in (types.UnionType, typing.Union) else {kind}
        if kinds <= {int, float, type(None)}:
            yield name, float in kinds, type(None) in kinds


def build(cls, **changed):
    known = parameters(cls)
    arguments = {name: value for name, value in {**NEEDED, **NETWORK}.items() if name in known}
    if issubclass(cls, L.LightningDataModule):
        arguments |= {"fake": True}
    if "source" in known:
        arguments |= {"source": data.DigitsDataModule(fake=True)}
    weight = torch.nn.Parameter(torch.zeros(2))
    if "params" in known:
        arguments["params"] = [("weight", weight)]
    if "optimizer" in known and issubclass(cls, torch.optim.lr_scheduler.LRScheduler):
        arguments["optimizer"] = torch.optim.SGD([weight], lr=0.1)
    if issubclass(cls, data.CIFARN | data.LabelFile):
        arguments |= {"path": "none.npz"}
    return cls(**{**arguments, **OTHERS.get(cls, {}), **changed})


NUMBERS = [
    pytest.param(cls, *number, id=f"{cls.__name__}-{number[0]}") for cls in find_classes() for number in numbers(cls)
]


@pytest.mark.parametrize("cls", find_classes(), ids=lambda cls: cls.__name__)
def test_all_can_be_built(cls):
    build(cls)


def test_there_are_many():
    assert len(NUMBERS) > 150
    assert {"temperature", "T_max", "eta_min", "rate", "batch_size", "every", "rho"} <= {p.values[1] for p in NUMBERS}


@pytest.mark.parametrize(("cls", "name", "fractional", "optional"), NUMBERS)
def test_what_is_no_number_is_refused(cls, name, fractional, optional):
    bad = [math.nan, math.inf, "1", True]
    bad += [] if optional else [None]
    bad += [] if fractional else [1.5]
    bad += [] if name in BELOW_0 else [-1]
    bad += [LIMITED[name]] if name in LIMITED else []
    bad += [0, 0.0] if name.endswith("temperature") or name in ("T_max", "batch_size", "every") else []
    for value in bad:
        with pytest.raises(ValueError, match=rf"^{name}\b.*, got {value!r}") as caught:
            build(cls, **{name: value})
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("cls", "name"),
    [(cls, name) for cls in find_classes() for name in STATISTICS if name in parameters(cls)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_statistics_are_numbers(cls, name):
    count = len(build(cls).mean) if "DataModule" in cls.__name__ else 1
    other = {"teacher_mean": "teacher_std", "teacher_std": "teacher_mean"}.get(name)
    for value in (math.nan, None, math.inf):
        with pytest.raises(ValueError, match=f"^{name} must be"):
            build(cls, **{name: [value] * count, **({other: [0.5]} if other else {})})


@pytest.mark.parametrize("bad", [math.nan, math.inf, None, "1"])
@pytest.mark.parametrize(
    ("cls", "name", "good"),
    [
        (data.ImageFolderDataModule, "scale", [0.5, 1.0]),
        (data.ImageFolderDataModule, "ratio", [0.5, 1.0]),
        (data.ImageFolderDataModule, "background", [0, 0, 0]),
        (data.ImageFolderDataModule, "image_range", [0.0, 1.0]),
        (callbacks.SharpnessReport, "rhos", [0.1, 0.2]),
        (lightning_kd.Classification, "input_shape", [1, 8, 8]),
    ],
)
def test_each_of_several_numbers_is_looked_at(cls, name, good, bad):
    build(cls, **{name: good})
    for k in range(len(good)):
        with pytest.raises(ValueError, match=f"^{name} must be .*got {bad!r}"):
            build(cls, **{name: [*good[:k], bad, *good[k + 1 :]]})


@pytest.mark.parametrize("value", [3, np.int64(3), 3.0, np.float32(3)])
def test_numbers_of_any_make_pass(value):
    check_numbers(least=3, most=3, above=2, below=4, x=value)


@pytest.mark.parametrize(
    ("rule", "value", "text"),
    [
        ({"above": 0}, -1, "x must be above 0, got -1: give such a finite number"),
        ({"least": 0, "below": 1}, None, "x must be at least 0 and below 1, got None: give such a finite number"),
        ({"least": 1, "whole": True}, 2.5, "x must be a whole number, got 2.5: give such a whole number"),
        ({"most": 2, "remedy": "lower it"}, 3, "x must be at most 2, got 3: lower it"),
        ({}, math.nan, "x must be finite, got nan: give a finite number"),
    ],
)
def test_the_sentence(rule, value, text):
    with pytest.raises(ValueError) as caught:
        check_numbers(x=value, **rule)
    assert str(caught.value) == text
    check_numbers(optional=True, x=None, **rule)
