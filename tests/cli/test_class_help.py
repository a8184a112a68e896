"""``--model.help NAME``, and the same for data, optimizers, schedulers and callbacks."""

import pytest
from torch import nn
from torch.optim import SGD

import lightning_kd
from lightning_kd.cli import main
from lightning_kd.cli.class_help import class_help, help_request
from lightning_kd.cli.named_classes import argument_names, known_classes


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["--model.help", "DHKD"],
            [
                "Dual-head knowledge distillation",
                "--model.temperature: float = 2.0",
                "temperature of the loss; in the paper 2 for the binary losses",
                "--model.student: str | Module (required)",
                "--model.student_weights: str | None = None",  # from a parent class
                "--model.lr_interval: str = 'epoch'",  # from the parent's parent
                '"epoch" or "step": when the scheduler steps.',
            ],
        ),
        (["--data.help=DigitsDataModule"], ["--data.batch_size: int = 64", "training samples per step and process."]),
        (["--model.optimizer.help", "SGD"], ["--model.optimizer.lr: float | Tensor = 0.001", "momentum factor"]),
        (["--model.lr_scheduler.help", "MultiStepLR"], ["--model.lr_scheduler.milestones: Iterable[int] (required)"]),
        (["--trainer.callbacks.help", "EarlyStopping"], ["--trainer.callbacks.patience: int = 3"]),
        (["--data.noise.help", "SymmetricNoise"], ["--data.noise.rate: float (required)"]),
        (["--model.help", "lightning_kd.KD"], ["Knowledge distillation"]),
        (["--model.help"], ["DHKD", "--model.help NAME"]),
        (["--model.optimizer.help"], ["SAM, SGD"]),
    ],
)
def test_help_of_a_class_shows_its_arguments_on_one_screen(words, expected, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", *words])
    assert not stop.value.code
    out = capsys.readouterr().out
    for text in expected:
        assert text in out
    assert len(out.splitlines()) <= 60


@pytest.mark.parametrize(
    ("key", "some"),
    [
        ("model", {"KD", "DHKD"}),
        ("data", {"DigitsDataModule"}),
        ("model.optimizer", {"SGD", "SAM"}),
        ("trainer.callbacks", {"TestCurve", "ModelSummary"}),
        ("model.lr_scheduler", {"CosineAnnealing", "StepLR"}),
    ],
)
def test_help_of_every_class_has_at_most_60_lines(key, some):
    found = known_classes(key)
    assert some <= found.keys()
    for name, cls in found.items():
        if cls.__module__.startswith(("lightning_kd.", "torch.optim.", "lightning.pytorch.callbacks.")):
            text = class_help(key, name)
            assert len(text.splitlines()) <= 60
            for argument in argument_names(cls):
                assert f"--{key}.{argument}" in text


def test_help_of_an_unknown_class_suggests_names(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--model.help", "DHKDD"])
    assert stop.value.code == 1
    assert capsys.readouterr().err == "error: --model 'DHKDD' is not known: did you mean DHKD, DKD?\n"


def test_help_requests_are_parsed():
    assert help_request(["fit", "--model.help", "KD"]) == ("model", "KD")
    assert help_request(["fit", "--trainer.callbacks+.help=KD"]) == ("trainer.callbacks", "KD")
    assert help_request(["fit", "--model.help", "--config", "x"]) == ("model", "")
    assert help_request(["fit", "--help"]) is None


def test_listed_arguments_are_those_a_config_takes():
    assert "params" not in argument_names(SGD)
    assert {"temperature", "teacher_weights", "lr_interval"} <= set(argument_names(lightning_kd.DHKD))


def test_help_of_a_class_with_many_arguments_is_cut():
    names = [f"argument_{number}" for number in range(90)]
    space: dict[str, object] = {}
    exec(f"def __init__(self, {', '.join(f'{name}: int = 0' for name in names)}): pass", space)
    type("ManyArguments", (nn.Module,), {"__init__": space["__init__"], "__doc__": "Many."})
    text = class_help("model.network", "ManyArguments")
    assert len(text.splitlines()) == 60
    assert text.endswith("lines more")
