"""``lightning-kd shift`` and ``lightning-kd sharpness`` on a finished checkpoint."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_kd.cli import main, shift_command
from lightning_kd.flatness import shift_network

QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
FIT = ["fit", "--config", "flatness/sgd_digits", "--config", "_overlay/smoke", *QUIET, "--run", "run"]


def load(name):
    return torch.load(f"run/checkpoints/{name}.ckpt", weights_only=True)


def test_a_checkpoint_is_shifted_tested_and_measured(tmp_path, capsys):
    main(FIT)
    capsys.readouterr()
    main(["shift", "--ckpt_path", "run/checkpoints/last.ckpt", "--guard", "null", "--samples", "20", *QUIET])
    out = capsys.readouterr().out
    assert "held-out loss" in out
    assert "next: lightning-kd test --config run/config.yaml --ckpt_path run/checkpoints/shifted.ckpt" in out
    old, new = load("last"), load("shifted")
    changed = [key for key, value in old["state_dict"].items() if not value.equal(new["state_dict"][key])]
    assert changed == ["network.fc.weight"]
    assert new["state_dict"][changed[0]].norm() < old["state_dict"][changed[0]].norm()
    report = new["optimum_shifting"]
    assert report == json.loads((tmp_path / "run/shift.json").read_text())
    assert report["loss_after"] == pytest.approx(report["loss_before"], abs=1e-5)
    assert report["layers"][0]["rank"] <= report["samples"] == 20
    assert {key: new[key] for key in ("epoch", "global_step")} == {"epoch": 1, "global_step": 6}
    main(["test", "--config", "run/config.yaml", "--ckpt_path", "run/checkpoints/shifted.ckpt", *QUIET])

    capsys.readouterr()
    main(["sharpness", "--run", "run", "--samples", "30", "--slices", "both", "--points", "3", *QUIET])
    out = capsys.readouterr().out
    assert "top eigenvalue" in out
    assert out.index("loss ") < out.index("trace ")
    (entry,) = json.loads((tmp_path / "run/sharpness.json").read_text())
    assert entry["checkpoint"].endswith("last.ckpt")
    assert entry["samples"] == 30
    for kind, shape in (("1d", (3,)), ("2d", (3, 3))):
        picture = tmp_path / f"run/pictures/loss_slice_last_{kind}.png"
        assert picture.read_bytes()[:4] == b"\x89PNG"
        saved = np.load(picture.with_suffix(".npz"))
        assert saved["loss"].shape == shape
        assert saved["loss"][(1,) * len(shape)] == pytest.approx(entry["loss"], rel=1e-5)


def test_a_student_is_shifted_and_an_undone_shift_writes_no_checkpoint(capsys, monkeypatch):
    main(["fit", "--config", "distillation/kd_digits", *FIT[3:], "--model.teacher_weights", "random"])
    capsys.readouterr()
    with monkeypatch.context() as patch:
        undo = lambda *args, **kwargs: replace(shift_network(*args, **kwargs), undone=True)  # noqa: E731
        patch.setattr(shift_command, "shift_network", undo)
        main(["shift", "--run", "run", "--samples", "12", *QUIET])
    out = capsys.readouterr().out
    assert "no shifted.ckpt is written" in out
    assert "next: lightning-kd test" not in out
    assert not Path("run/checkpoints/shifted.ckpt").exists()
    main(["shift", "--run", "run", "--guard", "null", "--samples", "12", *QUIET])
    assert load("shifted")["state_dict"].keys() == load("last")["state_dict"].keys()
    assert not any(key.startswith("teacher.") for key in load("shifted")["state_dict"])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["shift", "--ckpt_path", "none/checkpoints/last.ckpt"], "there is no none/config.yaml: add --config"),
        (["shift", "--run", "run", "--layers", "[conv]"], "layers: no module 'conv' in CNN"),
        (["shift", "--run", "run", "--samples", "5"], "samples=5 are fewer than the 10 classes"),
        (
            ["shift", "--run", "run", "--output", "run/checkpoints/last.ckpt"],
            "last.ckpt exists already",
        ),
        (["shift", "--run", "run", "--trainer.devices", "2"], "by one process, got 2: add --trainer.devices 1"),
    ],
)
def test_wrong_arguments_of_shift_raise_and_write_no_checkpoint(words, expected, fitted, capsys):
    before = sorted(path.name for path in (fitted / "run/checkpoints").iterdir())
    with pytest.raises(SystemExit):
        main([*words, *QUIET])
    assert expected in capsys.readouterr().err
    assert sorted(path.name for path in (fitted / "run/checkpoints").iterdir()) == before


@pytest.fixture(scope="module")
def fitted_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fitted")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(FIT)
    return folder


@pytest.fixture
def fitted(fitted_once, monkeypatch):
    monkeypatch.chdir(fitted_once)
    return fitted_once
