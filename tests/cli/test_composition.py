"""Configs composed of parts: how they are merged and printed, and their errors."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from jsonargparse import get_loader

import lightning_kd
from lightning_kd.cli import get_cli, main
from lightning_kd.cli.class_list import class_list
from lightning_kd.cli.composition import can_run, composed_settings, printed_config
from lightning_kd.cli.config_names import config_folder, config_names, config_path

PACKAGE = Path(lightning_kd.__file__).parent
SAM = {"class_path": "SAM", "init_args": {"rho": 0.05, "eta": 1}}
SGD = {"class_path": "SGD", "init_args": {"lr": 1}}


def write(folder, **files):
    """Write ``NAME.yaml`` for each argument, settings as YAML and text as it is; return the last path."""
    for name, settings in files.items():
        (folder / f"{name}.yaml").write_text(settings if isinstance(settings, str) else yaml.safe_dump(settings))
    return folder / f"{name}.yaml"


def merged(folder, first, second):
    return composed_settings(write(folder, a=first, b={"compose": ["a.yaml"], **second}))


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        # key by key
        ({"trainer": {"a": 1, "b": 2}}, {"trainer": {"b": 3, "c": 4}}, {"trainer": {"a": 1, "b": 3, "c": 4}}),
        ({"trainer": {"a": 1}}, {"trainer": {"a": None}}, {"trainer": {"a": None}}),
        ({"trainer": None}, {"trainer": {"a": 1}}, {"trainer": {"a": 1}}),
        # lists are replaced, and added to by NAME+
        ({"trainer": {"callbacks": [1, 2]}}, {"trainer": {"callbacks": [3]}}, {"trainer": {"callbacks": [3]}}),
        ({"trainer": {"callbacks": [1]}}, {"trainer": {"callbacks+": [2]}}, {"trainer": {"callbacks": [1, 2]}}),
        ({"trainer": {"callbacks+": [1]}}, {"trainer": {"callbacks+": 2}}, {"trainer": {"callbacks+": [1, 2]}}),
        ({"trainer": {"callbacks+": [1]}}, {"trainer": {"callbacks": [2]}}, {"trainer": {"callbacks": [2]}}),
        ({"trainer": {}}, {"trainer": {"callbacks+": [2]}}, {"trainer": {"callbacks+": [2]}}),
        # a class keeps its arguments, another class drops them
        ({"model": SAM}, {"model": {"init_args": {"rho": 1}}}, {"model": {**SAM, "init_args": {"rho": 1, "eta": 1}}}),
        ({"model": SAM}, {"model": SGD}, {"model": SGD}),
        ({"model": SAM}, {"model": {"class_path": "SGD"}}, {"model": {"class_path": "SGD"}}),
        ({"model": {"init_args": {"lr": 1}}}, {"model": {"class_path": "SGD"}}, {"model": SGD}),
        ({"model": SAM}, {"model": "SGD"}, {"model": "SGD"}),
        # a class may be given by several names
        (
            {"model": {**SAM, "class_path": "lightning_kd.flatness.SAM"}},
            {"model": {"class_path": "SAM", "init_args": {"rho": 1}}},
            {"model": {"class_path": "SAM", "init_args": {"rho": 1, "eta": 1}}},
        ),
        (
            {"model": {**SAM, "class_path": "lightning_kd.flatness.SAM"}},
            {"model": {"class_path": "lightning_kd.SAM"}},
            {"model": {**SAM, "class_path": "lightning_kd.SAM"}},
        ),
        (
            {"model": {**SGD, "class_path": "torch.optim.SGD"}},
            {"model": {"class_path": "mine.SGD"}},
            {"model": {"class_path": "mine.SGD"}},
        ),
    ],
)
def test_second_config_is_merged_into_the_first(first, second, expected, tmp_path):
    assert merged(tmp_path, first, second) == expected


def test_parts_merge_from_left_to_right_each_after_its_own_parts(tmp_path):
    write(tmp_path, a={"trainer": {"x": "a", "y": "a", "z": "a"}}, b={"trainer": {"x": "b", "y": "b"}})
    write(tmp_path, c={"compose": ["a.yaml"], "trainer": {"x": "c"}})
    assert composed_settings(write(tmp_path, d={"compose": ["b.yaml", "c.yaml"]})) == {
        "trainer": {"x": "c", "y": "a", "z": "a"}
    }
    assert composed_settings(write(tmp_path, d={"compose": ["c.yaml", "b.yaml"]})) == {
        "trainer": {"x": "b", "y": "b", "z": "a"}
    }
    own = {"compose": ["c.yaml", "b.yaml"], "trainer": {"y": "d"}}
    assert composed_settings(write(tmp_path, d=own)) == {"trainer": {"x": "b", "y": "d", "z": "a"}}


def test_shipped_part_is_found_despite_a_local_folder_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/digits").mkdir(parents=True)
    write(tmp_path / "data/digits", config={"trainer": {"max_epochs": 7}})
    own = write(tmp_path, own={"compose": ["flatness/sgd", "data/digits"]})
    assert composed_settings(own)["data"]["class_path"] == "lightning_kd.data.DigitsDataModule"


UNKNOWN = "which is neither a shipped config nor a .yaml file beside it: did you mean flatness/sam"
CIRCULAR = r"b.yaml is a part of itself \(.*b.yaml -> .*a.yaml -> .*b.yaml\): take one of them out"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"b": "compose: [flatness/smm]\n"}, f"b.yaml is composed of 'flatness/smm', {UNKNOWN}"),
        ({"b": "compose: [c.yaml]\n"}, "b.yaml is composed of 'c.yaml', which is neither"),
        ({"b": "compose: [b.yaml]\n"}, "b.yaml is a part of itself"),
        ({"a": "compose: [b.yaml]\n", "b": "compose: [a.yaml]\n"}, CIRCULAR),
        ({"b": "compose: flatness/sam\n"}, "compose in .*b.yaml must be a list of configs, got 'flatness/sam'"),
        ({"b": "compose: []\n"}, "must be a list of configs, got \\[\\]"),
        ({"b": "compose: [{a: 1}]\n"}, "must be a list of configs"),
        ({"b": "compose:\n"}, "must be a list of configs, got None"),
        ({"a": "a: 1\na: 2\n", "b": "compose: [a.yaml]\n"}, "a.yaml names a twice"),
        ({"a": "a: !mine 1\n", "b": "compose: [a.yaml]\n"}, "a.yaml is no YAML, in line 1: could not determine a"),
    ],
)
def test_wrong_compose_gives_a_one_line_error(files, message, tmp_path, capsys):
    path = write(tmp_path, **files)
    with pytest.raises(ValueError, match=message) as caught:
        composed_settings(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(SystemExit) as stop:
        main(["list", str(path)])
    assert stop.value.code == 1
    assert capsys.readouterr().err == f"error: {caught.value}\n"


def test_fit_reports_a_wrong_compose(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(write(tmp_path, b="compose: [flatness/smm]\n"))])
    assert re.fullmatch("error: .*b.yaml is composed of 'flatness/smm'.*\n", capsys.readouterr().err)


def test_error_in_a_part_names_its_file(tmp_path, capsys):
    write(tmp_path, a={"compose": ["data/digits"], "trainer": {"max_epoch": 3}})
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(write(tmp_path, b={"compose": ["flatness/sam", "a.yaml"]}))])
    error = capsys.readouterr().err
    assert error.startswith("error: --trainer.max_epoch does not exist: did you mean --trainer.max_epochs,")
    assert error.endswith(f"(in {tmp_path / 'a.yaml'}, {tmp_path / 'b.yaml'})\n")


def test_own_config_composes_parts_like_several_config_options(tmp_path):
    own = write(
        tmp_path, own={"compose": ["flatness/sam", "data/digits"], "model": {"init_args": {"network": "mlp_8"}}}
    )
    for words in (
        ["--config", str(own)],
        ["--config", "flatness/sam", "--config", "data/digits", "--model.network", "mlp_8"],
    ):
        cli = get_cli([*words, "--trainer.enable_progress_bar", "false"])
        assert (type(cli.datamodule).__name__, cli.model.hparams.network) == ("DigitsDataModule", "mlp_8")
        assert (cli.trainer.max_epochs, type(cli.model.configure_optimizers()["optimizer"]).__name__) == (200, "SAM")


@pytest.mark.parametrize("names", [["flatness/sam_digits"], ["flatness/sam", "data/digits"], ["_overlay/smoke"]])
def test_printed_config_gives_the_same_settings(names, tmp_path, capsys):
    main(["list", *names])
    text = capsys.readouterr().out
    settings = composed_settings(write(tmp_path, copy=text))
    assert settings == composed_settings(write(tmp_path, both={"compose": names}))
    assert text.startswith("# ")
    assert "compose:" not in text


def test_printed_config_lists_its_parts_in_order():
    comments = [line for line in printed_config(["flatness/sam_cifar100"]).splitlines() if line.startswith("#")]
    listed = [line.split()[1] for line in comments[2:]]
    assert listed == ["recipes/sgd_200", "flatness/sgd", "flatness/sam", "data/cifar100", "flatness/sam_cifar100"]
    assert all(len(line.split()) > 3 for line in comments)


def test_printed_values_are_read_back_unchanged(tmp_path):
    text = "# é\ncompose: [a.yaml]\nmodel: {a: 1.0e-8, b: 'off', c: null, d: [1, 2.5], e: '1', f: 1e-4, g: ' ', h: é}\n"
    path = write(tmp_path, a={"seed_everything": 0}, b=text)
    assert yaml.safe_load(printed_config([str(path)])) == composed_settings(path)


def test_numbers_and_dates_are_read_as_by_jsonargparse(tmp_path):
    text = "compose: [a.yaml]\nmodel: {a: 1e-4, b: '1e-4', c: 2026-13-01, d: '2026-01-01', e: 12}\n"
    path = write(tmp_path, a={"seed_everything": 0}, b=text)
    expected = {"a": 1e-4, "b": "1e-4", "c": "2026-13-01", "d": "2026-01-01", "e": 12}
    assert composed_settings(path)["model"] == expected
    copy = write(tmp_path, copy=printed_config([str(path)]))
    assert composed_settings(copy)["model"] == expected
    assert get_loader("yaml")(copy.read_text(encoding="utf-8"))["model"] == expected


def test_file_of_a_section_is_found_beside_the_config(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "elsewhere").mkdir()
    write(tmp_path / "mine", digits={"class_path": "lightning_kd.data.DigitsDataModule"})
    write(tmp_path / "mine", own={"compose": ["flatness/sgd"], "data": "digits.yaml", "model": {}})
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert composed_settings("../mine/own.yaml")["data"] == str(tmp_path / "elsewhere/../mine/digits.yaml")


def test_configs_inside_an_installed_package_are_found(tmp_path):
    package = tmp_path / "lightning_kd"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__", "configs"))
    shutil.copytree(config_folder(), package / "configs")
    done = subprocess.run(
        [sys.executable, "-c", "from lightning_kd.cli import main; main(['list', 'flatness/sam_digits'])"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.rstrip("\n") == printed_config(["flatness/sam_digits"]), done.stderr


def test_list_separates_parts_from_runnable_configs():
    whole, _, parts = class_list().partition("\nconfigs:\n")[2].partition("\nparts of configs")
    names = {name: can_run(composed_settings(config_path(name))) for name in config_names()}
    assert re.findall(r"^  (\S+)", whole, re.MULTILINE) == [name for name, complete in names.items() if complete]
    assert re.findall(r"^  (\S+)", parts, re.MULTILINE) == [name for name, complete in names.items() if not complete]
    assert names["flatness/sam_digits"]
    assert not any(names[name] for name in ("flatness/sam", "data/digits", "recipes/small", "_overlay/smoke"))


def test_every_data_and_recipe_part_is_used():
    files = {name: (config_folder() / f"{name}.yaml").read_text() for name in config_names()}
    used = {part for text in files.values() for part in yaml.safe_load(text).get("compose", [])}
    assert [name for name in files if name.startswith(("data/", "recipes/")) and name not in used] == []
    assert used <= files.keys()  # by name, not by path: they are found in an installed package
