"""Every class that a config can build refuses wrong numbers, in one sentence that names the argument."""

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
from lightning_kd.argument_checks import check_numbers, naming_argument
from lightning_kd.core import schedules
from lightning_kd.core.registry import family_packages
from lightning_kd.data import LabelNoise

NETWORK = {"num_classes": 4, "input_shape": (1, 8, 8)}
# values of the arguments that classes require
REQUIRED = {
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
REQUIRED_OF_CLASS = {  # further ones, of some classes only
    data.OpenSetDataModule: {"known_classes": 4, "initial_count": 2},
    data.CIFAR100DataModule: {"labels": "fine"},
    schedules.ConstantThenCosine: {"cosine_epochs": 2},
    lightning_kd.RDD: {"student": "fcn_tiny", "teacher": "fcn_tiny"},
}
MAY_BE_NEGATIVE = {"kurtosis_threshold", "last_epoch", "log_zero", "z_b"}
OUT_OF_RANGE = {"label_smoothing": 1.0, "rate": 1.1, "noise_rate": 1.0, "momentum": 1.0, "clip": 0.5, "late_beta1": 1.0}
STATISTICS = ("mean", "std", "teacher_mean", "teacher_std")


def config_classes():
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


def argument_types(cls):
    """All arguments of a class with their types, those that ``kwargs`` hands to its bases too."""
    found = {}
    for base in reversed(cls.__mro__):
        if "__init__" in vars(base) and base.__module__.startswith("lightning_kd"):
            known = inspect.signature(base.__init__).parameters
            if not any(p.kind is p.VAR_KEYWORD for p in known.values()):
                found = {}  # arguments of the bases cannot be given
            hints = typing.get_type_hints(base.__init__)
            found |= {name: hints.get(name) for name in known if name not in ("self", "kwargs")}
    return found


def number_arguments(cls):
    """Of each argument that is a number: its name, whether fractions are allowed, and whether None is."""
    for name, kind in argument_types(cls).items():
        kinds = set(typing.get_args(kind)) if typing.get_origin(kind) in (types.UnionType, typing.Union) else {kind}
        if kinds <= {int, float, type(None)}:
            yield name, float in kinds, type(None) in kinds


def build(cls, **changed):
    """An object of the class, with valid arguments except for those ``changed``."""
    known = argument_types(cls)
    arguments = {name: value for name, value in {**REQUIRED, **NETWORK}.items() if name in known}
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
    return cls(**{**arguments, **REQUIRED_OF_CLASS.get(cls, {}), **changed})


NUMBER_ARGUMENTS = [
    pytest.param(cls, *number, id=f"{cls.__name__}-{number[0]}")
    for cls in config_classes()
    for number in number_arguments(cls)
]


@pytest.mark.parametrize("cls", config_classes(), ids=lambda cls: cls.__name__)
def test_every_class_can_be_built_from_its_required_arguments(cls):
    build(cls)


def test_more_than_150_number_arguments_are_found():
    assert len(NUMBER_ARGUMENTS) > 150
    assert {"temperature", "T_max", "eta_min", "rate", "batch_size", "every", "rho"} <= {
        p.values[1] for p in NUMBER_ARGUMENTS
    }


@pytest.mark.parametrize(("cls", "name", "fractional", "optional"), NUMBER_ARGUMENTS)
def test_values_that_are_not_valid_numbers_raise(cls, name, fractional, optional):
    bad = [math.nan, math.inf, "1", True]
    bad += [] if optional else [None]
    bad += [] if fractional else [1.5]
    bad += [] if name in MAY_BE_NEGATIVE else [-1]
    bad += [OUT_OF_RANGE[name]] if name in OUT_OF_RANGE else []
    bad += [0, 0.0] if name.endswith("temperature") or name in ("T_max", "batch_size", "every") else []
    for value in bad:
        with pytest.raises(ValueError, match=rf"^{name}\b.*, got {value!r}") as caught:
            build(cls, **{name: value})
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("cls", "name"),
    [(cls, name) for cls in config_classes() for name in STATISTICS if name in argument_types(cls)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_mean_and_std_that_are_not_finite_numbers_raise(cls, name):
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
def test_a_bad_number_at_any_place_of_a_list_raises(cls, name, good, bad):
    build(cls, **{name: good})
    for k in range(len(good)):
        with pytest.raises(ValueError, match=f"^{name} must be .*got {bad!r}"):
            build(cls, **{name: [*good[:k], bad, *good[k + 1 :]]})


@pytest.mark.parametrize("value", [3, np.int64(3), 3.0, np.float32(3)])
def test_int_float_and_numpy_numbers_pass(value):
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
def test_error_sentence_names_the_rule_the_value_and_the_remedy(rule, value, text):
    with pytest.raises(ValueError) as caught:
        check_numbers(x=value, **rule)
    assert str(caught.value) == text
    check_numbers(optional=True, x=None, **rule)


def distilled(method, student="cnn_tiny", teacher="cnn_tiny", **given):
    return method(student, teacher, teacher_weights="random", **NETWORK, **given)


@pytest.mark.parametrize(
    ("make", "start"),
    [
        (lambda: lightning_kd.Classification("nonet", **NETWORK), "network 'nonet' is not known"),
        (lambda: distilled(lightning_kd.KD, "nonet"), "student: network 'nonet' is not known"),
        (lambda: distilled(lightning_kd.KD, teacher="nonet"), "teacher: network 'nonet' is not known"),
        (lambda: distilled(lightning_kd.KD, teacher="timm/nonet"), "teacher: network 'timm/nonet' is not known"),
        (lambda: distilled(lightning_kd.ReviewKD, student_stages=["none"]), "student_stages: no module 'none' in CNN"),
        (lambda: distilled(lightning_kd.ReviewKD, teacher_stages=["none"]), "teacher_stages: no module 'none' in CNN"),
        (lambda: distilled(lightning_kd.CRD, classifier="none"), "classifier path 'none' is nothing in CNN"),
        (lambda: distilled(lightning_kd.CRD, teacher_classifier="none"), "teacher_classifier: classifier path 'none'"),
        (lambda: lightning_kd.Classification("cnn_tiny", weights="none.pt", **NETWORK), "weights 'none.pt': there is"),
        (lambda: data.ArrayDataModule("text.npz"), "path 'text.npz' is damaged, or not an .npz/.npy file"),
        (lambda: data.ArrayDataModule("none.npz"), "path 'none.npz' does not exist"),
        (lambda: data.ArrayDataModule("one.npy", target_path="none.npy"), "target_path 'none.npy' does not exist"),
        (lambda: data.MultiLabelFolderDataModule("none"), "table 'none/labels.csv' does not exist"),
        (lambda: data.SegmentationFolderDataModule("x", "y", colours="none.csv"), "colours 'none.csv' does not exist"),
        (lambda: data.PartialLabelDataModule("none.mat"), "path 'none.mat' does not exist"),
        (lambda: data.LabelFile("none.csv").corrupt([0, 1], 2), "path 'none.csv' does not exist"),
        (lambda: data.TransitionNoise("none.npy").corrupt([0, 1], 2), "matrix 'none.npy' does not exist"),
    ],
)
def test_a_message_names_the_argument_of_a_wrong_name(make, start, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("one.npy", np.zeros((4, 8, 8), np.uint8))
    (tmp_path / "text.npz").write_text("text")
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        make()
    assert str(caught.value).startswith(start)
    assert "\n" not in str(caught.value)
    assert "allow_pickle" not in str(caught.value)


def test_samples_of_another_shape_are_told_at_the_start():
    trainer = L.Trainer(fast_dev_run=True, logger=False, enable_progress_bar=False, accelerator="cpu")
    for network in ("cnn_tiny", "mlp_8"):
        task = lightning_kd.Classification(network, 10, input_shape=(3, 32, 32))
        with pytest.raises(
            ValueError, match=r"input_shape=\(3, 32, 32\) does not fit the samples \(1, 8, 8\) of Digits"
        ):
            trainer.validate(task, data.DigitsDataModule(), verbose=False)
    own = lightning_kd.Classification(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)), 10)
    trainer.validate(own, data.DigitsDataModule(), verbose=False)  # a module knows its inputs itself


def test_the_name_of_an_argument_is_put_before_a_message_once():
    with pytest.raises(ValueError, match=r"^stages: there is none$"), naming_argument("stages"):
        raise ValueError("there is none")
    with pytest.raises(FileNotFoundError, match=r"^path 'a' is missing$"), naming_argument("path"):
        raise FileNotFoundError("path 'a' is missing")
    with pytest.raises(ValueError, match=r"^path: .*utf-8.*codec"), naming_argument("path"):
        b"\xff".decode("utf-8")
    with pytest.raises(KeyError), naming_argument("path"):
        raise KeyError("a")
