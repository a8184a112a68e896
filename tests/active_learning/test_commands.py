"""Active learning on the command line: fit, query, label, test, predict and active."""

import csv
import signal

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from lightning_kd.cli import main
from lightning_kd.cli.composition import composed_settings
from lightning_kd.cli.config_names import config_path
from lightning_kd.pool import PoolRecord
from lightning_kd.pool.pool_record import alone
from tests.active_learning.test_rounds import outcome
from tests.forked import run_command

QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
SHORT = [*QUIET, "--trainer.max_epochs", "2", "--trainer.accelerator", "cpu"]
CONFIG = ["--config", "active_learning/entropy_digits"]


def fill(path, label):
    """Fill in the labels of a query file; returns its rows."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row["label"] = label(row)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return rows


def test_fit_query_and_label_with_answers_of_a_person(capsys):
    main(["fit", *CONFIG, *SHORT, "--run", "r"])
    asked = []
    for number in range(2):
        main(["query", "--config", "r/config.yaml", *QUIET])
        assert f"lightning-kd label r/query_{number:02d}.csv" in capsys.readouterr().out
        asked += fill(f"r/query_{number:02d}.csv", lambda row: "unknown" if int(row["index"]) % 2 else row["predicted"])
        with pytest.raises(SystemExit):
            main(["query", "--config", "r/config.yaml", *QUIET])
        assert "wait for an answer" in capsys.readouterr().err
        main(["label", f"r/query_{number:02d}.csv"])
        with pytest.raises(SystemExit):  # the checkpoint was trained before these answers
            main(["fit", "--config", "r/config.yaml", "--ckpt_path", "last", "--trainer.max_epochs", "3"])
        assert "trained on other labels" in capsys.readouterr().err
        main(["fit", "--config", "r/config.yaml", "--overwrite"])
    record = PoolRecord.load("r/pool.json")
    answers = {row["index"]: row["answer"] for row in record.queries}
    assert answers == {int(row["index"]): row["label"] for row in asked}
    assert {row["by"] for row in record.queries} == {"person"}
    assert len(answers) == 80
    main(["test", "--config", "r/config.yaml", "--ckpt_path", "last"])
    main(["predict", "--config", "r/config.yaml", "--ckpt_path", "last"])
    with open("r/predictions.csv") as file:
        assert len(file.readlines()) == 1 + 1438 - 20 - 80


def test_query_without_checkpoint_and_active_without_pool_method_fail(capsys):
    for args in (CONFIG, ["--config", "distillation/student_digits"]):
        with pytest.raises(SystemExit):
            main(["query", *args, *QUIET, "--run", "r"])
        assert "there is no r/checkpoints/last.ckpt" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["active", "--config", "distillation/student_digits", *QUIET, "--run", "r"])
    assert "active needs a method for pools" in capsys.readouterr().err


ACTIVE = ["active", *CONFIG, *SHORT, "--data.rounds", "2", "--run", "r"]
SHORT_ACTIVE = [*ACTIVE, "--data.rounds", "1", "--trainer.max_epochs", "1"]


def test_active_run_twice_changes_nothing_and_each_round_is_a_run_folder(capsys, tmp_path):
    main(ACTIVE)
    out = capsys.readouterr().out
    assert "round 1 of 2: 40 labels bought" in out
    assert "next: lightning-kd compare" in out
    before = outcome(tmp_path / "r")
    main(ACTIVE)
    assert outcome(tmp_path / "r") == before
    for number in range(3):
        config = yaml.safe_load((tmp_path / f"r/round_0{number}/config.yaml").read_text())
        assert config["seed_everything"] == number
    # test and fit one round again from its own folder
    weights = torch.load("r/round_01/network.pt", weights_only=True)
    main(["test", "--config", "r/round_01/config.yaml", "--ckpt_path", "last"])
    main(["fit", "--config", "r/round_01/config.yaml", "--overwrite"])
    again = torch.load("r/round_01/network.pt", weights_only=True)
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    main(["compare", "r", "--metric", "test/acc", "--metric", "query/recall"])
    assert "query/recall" in capsys.readouterr().out


def test_overwrite_starts_anew_but_never_deletes_answers_of_a_person(capsys):
    main(SHORT_ACTIVE)
    main([*SHORT_ACTIVE, "--overwrite", "--seed_everything", "5"])
    record = PoolRecord.load("r/pool.json")
    assert [row["seed"] for row in record.results] == [5, 6]
    record.queries[0]["by"] = "person"
    record.save()
    with pytest.raises(SystemExit):
        main([*SHORT_ACTIVE, "--overwrite"])
    assert "queries to a person" in capsys.readouterr().err
    assert len(PoolRecord.load("r/pool.json").queries) == 40


def modification_times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name not in BOOKKEEPING}


BOOKKEEPING = ("run.json", "traceback.txt", ".pool.lock")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished benchmark, for tests that must not change it."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(SHORT_ACTIVE)
    return folder


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--overwrite", "--data.budget", "100000"], "budget=100000 is more than"),
        (["--overwrite", "--data.known_classes", "1"], "known_classes must be at least 2"),
        (["--trainer.max_epochs", "3"], "were made with trainer.max_epochs=1, got 3"),
        (["--model.strategy", "random"], "were made with model.init_args.strategy=entropy, got random"),
        (["--data.split_seed", "3"], "were made with data.init_args.split_seed=0, got 3"),
        (["--seed_everything", "3"], "were made with seed_everything=0, got 3"),
        (["--trainer.fast_dev_run", "1"], "got fast_dev_run=1"),
        (["--overwrite", "--trainer.fast_dev_run", "1"], "got fast_dev_run=1"),
    ],
)
def test_refused_settings_of_active_change_no_file(capsys, finished, monkeypatch, extra, message):
    monkeypatch.chdir(finished)
    before = modification_times(finished / "r")
    with pytest.raises(SystemExit):
        main([*SHORT_ACTIVE, *extra])
    assert message in capsys.readouterr().err
    assert modification_times(finished / "r") == before


def test_active_refuses_folders_with_queries_or_fits_made_by_hand(capsys, tmp_path):
    short = [*CONFIG, *SHORT, "--data.rounds", "1", "--run"]
    main(["active", *short, "r"])
    # a query made by hand in the last round's folder
    main(["query", "--config", "r/round_01/config.yaml", *QUIET])
    fill("r/round_01/query_01.csv", lambda row: "unknown")
    main(["label", "r/round_01/query_01.csv"])
    before = modification_times(tmp_path / "r")
    for extra in (["--data.rounds", "2"], ["--overwrite"]):
        with pytest.raises(SystemExit):
            main(["active", *short, "r", *extra])
        assert "r/round_01/pool.json holds queries" in capsys.readouterr().err
        assert (
            modification_times(tmp_path / "r").items()
            >= {k: v for k, v in before.items() if k.name != "config.yaml"}.items()
        )
    # the folder of a single fit
    main(["fit", *short, "h"])
    main(["query", "--config", "h/config.yaml", *QUIET])
    before = modification_times(tmp_path / "h")
    for extra in ([], ["--overwrite"]):
        with pytest.raises(SystemExit):
            main(["active", *short, "h", *extra])
        assert "h holds a single fit" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["fit", *short, "h", "--overwrite", "--data.split_seed", "3"])
    assert "was begun with" in capsys.readouterr().err
    assert modification_times(tmp_path / "h") == before


def test_locked_pool_refuses_commands_and_query_restores_lost_files(capsys, tmp_path):
    main(["fit", *CONFIG, *SHORT, "--run", "r"])
    main(["query", "--config", "r/config.yaml", *QUIET])
    fill("r/query_00.csv", lambda row: "unknown")
    with alone(tmp_path / "r"):
        for args in (["query", "--config", "r/config.yaml", *QUIET], ["label", "r/query_00.csv"]):
            with pytest.raises(SystemExit):
                main(args)
            assert "another command works on the pool" in capsys.readouterr().err
    page = tmp_path / "r/query_00.html"
    before = page.read_bytes()
    (tmp_path / "r/query_00.csv").unlink()
    page.unlink()
    main(["query", "--config", "r/config.yaml", *QUIET])  # brings the lost files back
    assert page.read_bytes() == before
    assert len((tmp_path / "r/query_00.csv").read_text().splitlines()) == 41
    assert PoolRecord.load("r/pool.json").round == 1


def test_image_folder_with_unlabelled_pool_is_queried_but_active_fails(capsys, tmp_path):
    generator = np.random.default_rng(0)
    for place in ("train/cat", "train/=dög", "test/cat", "test/=dög", "unlabelled/@a", "unlabelled/b"):
        folder = tmp_path / "photos" / place
        folder.mkdir(parents=True)
        for k in range(6):
            pixels = generator.integers(0, 255, (12, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{k} é.png")
    config = composed_settings(config_path("active_learning/lfosa_digits"))
    config["data"]["init_args"] = {
        "source": {
            "class_path": "lightning_kd.data.ImageFolderDataModule",
            "init_args": {"root": "photos", "image_size": 8, "batch_size": 4, "val_fraction": 0.0},
        },
        "pool": "photos/unlabelled",
        "budget": 3,
    }
    (tmp_path / "my_pool.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", "my_pool.yaml", "--run", "r", *SHORT])
    assert "next: lightning-kd query" in capsys.readouterr().out
    main(["query", "--config", "r/config.yaml", *QUIET])
    rows = fill("r/query_00.csv", lambda row: "=dög" if "@a" in row["path"] else "unknown")
    assert list(rows[0]) == ["index", "path", "score", "predicted", "label"]
    assert {row["predicted"] for row in rows} <= {"cat", "'=dög"}  # escaped, so that no spreadsheet reads a formula
    assert all((tmp_path / "photos/unlabelled" / row["path"].removeprefix("'")).is_file() for row in rows)
    main(["label", "r/query_00.csv"])
    main(["fit", "--config", "r/config.yaml", "--overwrite"])
    main(["test", "--config", "r/config.yaml", "--ckpt_path", "last"])
    with pytest.raises(SystemExit):
        main(["active", "--config", "my_pool.yaml", "--run", "other", *SHORT])
    assert "no true labels for an oracle" in capsys.readouterr().err
    answers = {row["path"]: row["answer"] for row in PoolRecord.load("r/pool.json").queries}
    assert answers == {row["path"].removeprefix("'"): row["label"] for row in rows}


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--ckpt_path", "last"], "active resumes by itself"),
        (["--seed_everything", "false"], "active needs a seed"),
        (["--data.budget", "0"], "budget must be at least 1"),
        (["--data.known_classes", "1"], "known_classes must be at least 2"),
        (["--model.strategy", "best"], "best"),
    ],
)
def test_wrong_settings_of_active_fail_before_any_training(capsys, tmp_path, extra, message):
    with pytest.raises(SystemExit):
        main([*ACTIVE, *extra])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "r/round_00/checkpoints").exists()
    assert not (tmp_path / "r/pool.json").exists()


NETWORK = """
import os, signal
from torch import nn


class Dropping(nn.Module):
    passes = 0

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3))
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        Dropping.passes += 1
        if Dropping.passes == int(os.environ.get("KILL_AT", -1)):
            os.kill(os.getpid(), signal.SIGKILL)
        return self.head(self.body(x))
"""


def active(folder, run, **environment):
    arguments = [*ACTIVE[:-1], run, "--model.network.class_path", "dropping.Dropping"]
    return run_command(*arguments, folder=folder, **environment)


# killed while round 1 trains; then, started again, also while it scores the pool
@pytest.mark.parametrize("kills", [("16",), pytest.param(("16", "9"), marks=pytest.mark.slow)])
def test_active_killed_and_started_again_equals_an_undisturbed_run(tmp_path, kills):
    (tmp_path / "dropping.py").write_text(NETWORK)
    whole = active(tmp_path, "whole")
    assert whole.returncode == 0, whole.stderr
    for kill_at in kills:
        killed = active(tmp_path, "broken", KILL_AT=kill_at)
        assert killed.returncode == -signal.SIGKILL
        assert len(PoolRecord.load(tmp_path / "broken/pool.json").results) == 1
    resumed = active(tmp_path, "broken")
    assert resumed.returncode == 0, resumed.stderr
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "whole")
