"""Verbs that need neither torch nor lightning do not import them, and still list every class."""

import inspect
import subprocess
import sys

import lightning as L
import pytest

import lightning_kd.callbacks
import lightning_kd.core
import lightning_kd.data
from lightning_kd.cli.class_list import class_list
from lightning_kd.core import Task
from lightning_kd.core.registry import family_packages
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
    text = class_list()
    lines = text[text.index(f"{title}:\n") :].splitlines()[1:]
    end = next(i for i, line in enumerate(lines) if not line.startswith("  "))
    assert [line.split()[0] for line in lines[:end]] == expected
    for line in lines[:end]:
        assert line.endswith(inspect.getdoc(named[line.split()[0]]).partition("\n")[0])


def test_list_has_separate_sections_and_ends_with_advice():
    *sections, end = class_list().split("\n\n")
    assert [one.partition(":\n")[0].split(",")[0] for one in sections] == [
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
