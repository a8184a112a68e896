"""What a command prints at its end, and which files remain where it fails before its work begins."""

import json
import re
from pathlib import Path

import lightning as L
import numpy as np
import pytest

from lightning_kd.cli import get_cli, main
from lightning_kd.core import Classification
from tests.forked import run_command, run_forked

QUIET = ["--trainer.enable_progress_bar", "false"]
FIT = ["fit", "--config", "distillation/teacher_digits", "--config", "_overlay/smoke", *QUIET]
TEST = ["test", "--config", "x/config.yaml", *QUIET, "--ckpt_path", "last"]
BREAKING = [
    ["--data.batch_size", "-3"],  # fails while the command line is parsed and built
    ["--model.network", "resnet8x5"],
    ["--trainer.callbacks", "tests.cli.test_endings.Refusing"],  # fails in trainer.fit, before the first step
]
REASONS = {"--data.batch_size": "batch_size", "--model.network": "resnet8x5", "--trainer.callbacks": "not today"}


class Refusing(L.Callback):
    def on_sanity_check_end(self, trainer, pl_module):
        raise ValueError("not today")


@pytest.fixture(autouse=True)
def traces(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("traces")
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def content(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main([*FIT, "--run", "x"])
    return folder


@pytest.mark.parametrize("extra", BREAKING, ids=["data", "network", "callback"])
@pytest.mark.parametrize("noise", [False, True])
def test_a_failed_fit_leaves_no_folder(extra, noise, tmp_path, capsys):
    noisy = ["--data.noise", "SymmetricNoise", "--data.noise.rate", "0.2"] if noise else []
    with pytest.raises(SystemExit) as stop:
        main([*FIT, *noisy, *extra])
    assert stop.value.code == 1
    assert not list(tmp_path.iterdir())
    out = capsys.readouterr()
    assert "go on with" not in out.out
    assert re.match(f"error: .*({REASONS[extra[0]]})", out.err)


@pytest.mark.parametrize("extra", BREAKING, ids=["data", "network", "callback"])
@pytest.mark.parametrize("kind", [["--overwrite"], ["--ckpt_path", "last", "--trainer.max_epochs", "3"]])
def test_a_failed_fit_leaves_an_earlier_run_untouched(extra, kind, trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    before = content("x")
    with pytest.raises(SystemExit):
        main([*FIT, "--run", "x", *kind, *extra])
    assert content("x") == before
    out = capsys.readouterr()
    assert "go on with" not in out.out
    assert re.match(f"error: .*({REASONS[extra[0]]})", out.err)
    assert not Path("x/.before").exists()


def test_a_failed_evaluation_leaves_the_run_untouched(trained, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(trained)
    before = content("x")
    for verb in ("test", "validate", "predict"):
        with pytest.raises(SystemExit):
            main([verb, *TEST[1:], "--data.batch_size", "-3"])
        assert "batch_size" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["shift", "--run", "x", "--layers", "[conv]", *QUIET])
    assert "layers: no module 'conv' in CNN" in capsys.readouterr().err
    assert content("x") == before
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["test", *FIT[1:], "--data.batch_size", "-3"])
    assert not list(tmp_path.iterdir())
    out = capsys.readouterr()
    assert "go on with" not in out.out
    assert "batch_size" in out.err


def test_a_failed_active_leaves_the_earlier_rounds_untouched(tmp_path, capsys):
    active = ["active", "--config", "active_learning/entropy_digits", *QUIET, "--trainer.max_epochs", "1"]
    active += ["--data.rounds", "1", "--run", "r"]
    with pytest.raises(SystemExit):
        main([*active, *BREAKING[2]])
    assert not list(tmp_path.iterdir())
    main(active)
    assert "next: lightning-kd compare r\n" in capsys.readouterr().out
    before = content("r")
    with pytest.raises(SystemExit):
        main([*active, "--overwrite", *BREAKING[2]])
    assert content("r") == before
    out = capsys.readouterr()
    assert "go on with" not in out.out
    assert out.err.startswith("error: not today\n")


class Reading(L.Callback):
    record: dict = {}

    def on_train_batch_start(self, *args):
        Reading.record = json.loads(Path("x/run.json").read_text())


def test_class_names_are_in_the_record_while_fit_runs():
    image, target = np.zeros((30, 4, 4), np.uint8), np.array(["bee", "ant", "cat"] * 10)
    np.savez("own.npz", image=image, target=target)
    data = ["--data", "ArrayDataModule", "--data.path", "own.npz", "--run", "x", "--trainer.accelerator", "cpu"]
    task = ["--model", "Classification", "--model.network", "mlp_8", "--trainer.max_epochs", "1"]
    main(["fit", *task, *data, *QUIET, "--trainer.callbacks", "tests.cli.test_endings.Reading"])
    assert Reading.record["outcome"] == "running"
    assert Reading.record["class_names"] == ["ant", "bee", "cat"]


def test_fit_failing_in_training_says_how_to_go_on(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([*FIT, "--model.optimizer.lr", "1e30", "--model.network", "mlp_32", "--run", "x"])
    out = capsys.readouterr()
    assert "go on with: lightning-kd fit" in out.out
    assert "(trace in x/traceback.txt)" in out.err
    assert json.loads(Path("x/run.json").read_text())["outcome"] == "failed"


def test_error_in_a_users_class_saves_its_traceback(tmp_path, traces, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "broken_net.py").write_text(
        "from torch import nn\n\n\nclass Broken(nn.Module):\n    def __init__(self):\n        len(3)\n"
    )
    with pytest.raises(SystemExit):
        main([*FIT, "--model.network.class_path", "broken_net.Broken"])
    error = capsys.readouterr().err
    assert error.startswith("error: object of type 'int' has no len()\n(trace in ")
    (trace,) = traces.glob("lightning-kd-*.txt")
    assert "Traceback" in trace.read_text()


def test_compare_is_suggested_only_after_a_second_run(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    main(TEST)
    main(["predict", *TEST[1:]])
    out = capsys.readouterr().out
    assert "next:" not in out
    assert "in x/predictions.csv\n" in out
    main([*FIT, "--run", "y", "--seed_everything", "1"])
    main(TEST)
    assert "next: lightning-kd compare .\n" in capsys.readouterr().out
    main(["compare", "."])


def test_model_size_is_one_line_unless_the_summary_is_set(capsys, tmp_path):
    fit = ["fit", "--config", "distillation/dhkd_digits", *FIT[3:], "--model.teacher_weights", "random"]
    main([*fit, "--run", "x"])
    out = capsys.readouterr().out
    assert "DHKD: 6,604 parameters trained, 94,186 frozen\n" in out
    assert "FLOPs" not in out
    main([*fit, "--run", "y", "--trainer.enable_model_summary", "true"])
    assert "FLOPs" in capsys.readouterr().out
    main([*fit, "--run", "z", "--trainer.enable_model_summary", "false"])
    assert "parameters" not in capsys.readouterr().out


def fit_from_python():
    cli = get_cli(FIT[1:])
    cli.trainer.fit(cli.model, cli.datamodule)
    assert isinstance(cli.model, Classification)


def test_fit_prints_few_lines_and_nothing_to_stderr(tmp_path):
    done = run_command(*FIT, "--run", "x", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.strip().splitlines()) == 5
    done = run_forked(fit_from_python, folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "Classification: 94,186 parameters trained\n"


def test_fit_with_nothing_left_to_train_says_so_and_records_its_times(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    main([*FIT, "--run", "x", "--ckpt_path", "last"])
    assert "fit finished with nothing left to train" in capsys.readouterr().out
    record = json.loads(Path("x/run.json").read_text())
    assert (record["verb"], record["outcome"]) == ("fit", "finished")
    assert record["start"] <= record["end"]


def test_a_users_model_summary_is_shown_instead_of_the_size_line(tmp_path):
    done = run_command(*FIT, "--trainer.callbacks", "lightning.pytorch.callbacks.ModelSummary", folder=tmp_path)
    assert done.returncode == 0
    assert "parameters trained" not in done.stdout
    assert (done.stdout + done.stderr).count("Trainable params") == 1
