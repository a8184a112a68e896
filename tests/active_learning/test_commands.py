"""The verbs as commands."""

import csv
import os
import signal
import subprocess
import sys

import pytest
import torch
import yaml

from lightning_kd.cli import main
from lightning_kd.pool import PoolRecord
from tests.active_learning.test_rounds import outcome

QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
SHORT = [*QUIET, "--trainer.max_epochs", "2", "--trainer.accelerator", "cpu"]
CONFIG = ["--config", "active_learning/entropy_digits"]


def fill(path, label):
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row["label"] = label(row)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return rows


def test_a_person_in_the_loop(capsys):
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
        with pytest.raises(SystemExit):  # the weights know nothing of these answers
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


def test_query_needs_a_trained_pool_task(capsys):
    for args in (CONFIG, ["--config", "distillation/student_digits"]):
        with pytest.raises(SystemExit):
            main(["query", *args, *QUIET, "--run", "r"])
        assert "there is no r/checkpoints/last.ckpt" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["active", "--config", "distillation/student_digits", *QUIET, "--run", "r"])
    assert "active needs a method for pools" in capsys.readouterr().err


ACTIVE = ["active", *CONFIG, *SHORT, "--data.rounds", "2", "--run", "r"]


def test_active_leaves_whole_runs(capsys, tmp_path):
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
    # a round by hand, from its own folder
    weights = torch.load("r/round_01/network.pt", weights_only=True)
    main(["test", "--config", "r/round_01/config.yaml", "--ckpt_path", "last"])
    main(["fit", "--config", "r/round_01/config.yaml", "--overwrite"])
    again = torch.load("r/round_01/network.pt", weights_only=True)
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    main(["compare", "r", "--metric", "test/acc", "--metric", "query/recall"])
    assert "query/recall" in capsys.readouterr().out


def test_overwrite_begins_anew_but_never_loses_a_person(capsys):
    main(ACTIVE)
    main([*ACTIVE, "--overwrite", "--seed_everything", "5"])
    record = PoolRecord.load("r/pool.json")
    assert [row["seed"] for row in record.results] == [5, 6, 7]
    record.queries[0]["by"] = "person"
    record.save()
    with pytest.raises(SystemExit):
        main([*ACTIVE, "--overwrite"])
    assert "answers of a person" in capsys.readouterr().err
    assert len(PoolRecord.load("r/pool.json").queries) == 80


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--ckpt_path", "last"], "active goes on by itself"),
        (["--seed_everything", "false"], "active needs a seed"),
        (["--data.budget", "0"], "budget must be at least 1"),
        (["--data.known_classes", "1"], "known_classes must be at least 2"),
        (["--model.strategy", "best"], "best"),
    ],
)
def test_bad_input_before_any_training(capsys, tmp_path, extra, message):
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
    return subprocess.run(
        [sys.executable, "-m", "lightning_kd", *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_sigkill_and_start_again(tmp_path):
    (tmp_path / "dropping.py").write_text(NETWORK)
    whole = active(tmp_path, "whole")
    assert whole.returncode == 0, whole.stderr
    for kill_at in ("16", "9"):  # while round 1 is trained; then, going on, while its pool is scored
        killed = active(tmp_path, "broken", KILL_AT=kill_at)
        assert killed.returncode == -signal.SIGKILL
        assert len(PoolRecord.load(tmp_path / "broken/pool.json").results) == 1
    resumed = active(tmp_path, "broken")
    assert resumed.returncode == 0, resumed.stderr
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "whole")
