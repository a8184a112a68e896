"""Verbs that need neither torch nor lightning do not import them, and still list every class."""

import inspect
import subprocess
import sys

import lightning as L
import pytest

import lightning_kd.callbacks
import lightning_kd.core
import lightning_kd.data
from lightning_kd.cli import main
from lightning_kd.cli.class_list import class_list, configs_of
from lightning_kd.cli.composition import first_line
from lightning_kd.cli.config_names import config_folder, config_names
from lightning_kd.core import Task
from lightning_kd.core.registry import FAMILIES, family_packages
from lightning_kd.nets import network_names, segmentation_network_names


@pytest.mark.parametrize(
    "words",
    [
        *(
            ["--version"],
            ["--help"],
            [],
            ["list"],
            ["list", "flatness/sam_digits"],
            ["list", "DKD"],
            ["compare", "--help"],
            ["label", "--help"],
            ["fitt"],
        ),
        *(["claim"], ["claim", "--help"], ["claim", "dhdk"]),
    ],
)
def test_light_verbs_import_neither_torch_nor_lightning(words, tmp_path):
    code = (
        "import sys\nfrom lightning_kd.cli import main\n"
        f"try:\n    main({words})\nexcept SystemExit: pass\n"
        "print([name for name in ('torch', 'lightning', 'jsonargparse') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("title", "packages", "base"),
    [
        ("methods", [lightning_kd.core, *family_packages()], Task),
        ("callbacks", [lightning_kd.callbacks, *family_packages()], L.Callback),
        ("data modules", [lightning_kd.data], L.LightningDataModule),
    ],
)
def test_list_names_every_public_class_with_its_first_line(title, packages, base):
    named = {name: getattr(package, name) for package in packages for name in package.__all__}
    expected = [
        name
        for name, value in sorted(named.items())
        if inspect.isclass(value) and issubclass(value, base)
        if not name.endswith("Task") and not inspect.isabstract(value)
    ]
    sections = [part.splitlines() for part in class_list().split("\n\n")]
    lines = sorted(line for first, *lines in sections if first.rstrip(":").split(",")[0] == title for line in lines)
    assert [line.split()[0] for line in lines] == expected
    for line in lines:
        assert line.endswith(inspect.getdoc(named[line.split()[0]]).partition("\n")[0])


def test_methods_are_listed_by_family():
    found = dict(part.split(":\n", 1) for part in class_list().split("\n\n")[:-1])
    titles = ["plain training", *(family.replace("_", " ") for family in FAMILIES)]
    assert list(found)[: len(titles)] == [f"methods, {title}" for title in titles]
    for title, name in (
        ("plain training", "Classification"),
        ("distillation", "DKD"),
        ("noisy labels", "BLDR"),
        ("flatness", "OptimumShiftingClassifier"),
    ):
        assert f"  {name} " in found[f"methods, {title}"]


def test_list_has_separate_sections_and_ends_with_advice():
    *sections, end = class_list().split("\n\n")
    assert list(dict.fromkeys(one.partition(":\n")[0].split(",")[0] for one in sections)) == [
        "methods",
        "optimizers",
        "callbacks",
        "data modules",
        "networks",
        "configs",
        "parts of configs",
    ]
    assert "lightning-kd list NAME" in end
    assert "lightning-kd fit --model.help NAME" in end


def test_the_networks_are_listed():
    assert f"networks:\n  {', '.join(sorted([*network_names(), *segmentation_network_names()]))}\n" in class_list()


@pytest.mark.parametrize("name", ["DKD", "dkd"])
def test_a_class_is_listed_with_the_configs_that_name_it(name, capsys):
    main(["list", name])
    head, *lines, empty, end = capsys.readouterr().out.splitlines()
    assert head == "DKD: Decoupled knowledge distillation (Zhao et al., CVPR 2022, arXiv 2203.08679)."
    configs = [line.split()[0] for line in lines]
    assert {"distillation/dkd_digits", "distillation/dkd_cifar100", "distillation/dkd"} <= {*configs}
    assert not {"distillation/kd_digits", "distillation/teacher_digits"} & {*configs}
    assert lines[0].endswith(first_line(config_folder() / f"{configs[0]}.yaml"))
    assert (empty, end) == ("", "its arguments: lightning-kd fit --model.help DKD")


@pytest.mark.parametrize(
    ("name", "config", "end"),
    [
        ("SAM", "flatness/sam_digits", "--model.optimizer.help SAM"),
        ("CIFAR100DataModule", "data/cifar100", "--data.help CIFAR100DataModule"),
        ("OptimumShifting", "flatness/with_shift", "--trainer.callbacks.help OptimumShifting"),
    ],
)
def test_configs_are_found_by_what_they_hold(name, config, end):
    text = configs_of(name)
    assert f"\n  {config} " in text
    assert text.endswith(end)


def test_a_class_that_no_config_names_is_told_so():
    assert "\n  none of the configs names it\n" in configs_of("Supervised")


@pytest.mark.parametrize("name", ["distillation", "distillation/", "Distillation"])
def test_a_folder_is_listed_with_its_configs(name):
    head, *lines = configs_of(name).splitlines()
    assert head == f"configs of {name}:"
    expected = [config for config in config_names() if config.startswith("distillation/")]
    assert [line.split()[0] for line in lines] == expected


def test_an_unknown_name_is_told(capsys):
    for name, message in (
        ("xyzzy", "'xyzzy' is no config, class or folder of configs: `lightning-kd list` shows all"),
        ("DHKDD", "'DHKDD' is no config, class or folder of configs: did you mean DHKD, DKD, "),
        ("flatness/sam_digit", "did you mean flatness/sam_digits, "),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["list", name])
        assert stop.value.code == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
