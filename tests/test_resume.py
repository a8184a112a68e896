"""A killed and resumed run equals an undisturbed one to the bit; a failed run leaves a usable checkpoint and table."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import lightning as L
import pytest
import torch
from torch import nn

from lightning_kd.cli import main
from lightning_kd.core import Classification
from lightning_kd.core.run_callbacks import run_callbacks
from lightning_kd.core.run_folder import RunFolder
from lightning_kd.core.run_logger import RunLogger
from lightning_kd.data import DigitsDataModule
from tests.forked import THREADS, run_command
from tests.two_processes import on_two_ranks

NETWORK = """
import os, signal, torch
from torch import nn


class Dropping(nn.Module):
    \"\"\"Has dropout and batch norm; kills its process in training step KILL_AT, counted over the process.\"\"\"

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3))
        self.head = nn.Linear(8 * 36, 10)
        self.steps = 0

    def forward(self, x):
        if self.training:
            self.steps += 1
            if self.steps == int(os.environ.get("KILL_AT", -1)):
                os.kill(os.getpid(), signal.SIGKILL)
        return self.head(self.body(x))
"""


OPTIONS = (
    "--config distillation/dhkd_digits --model.student.class_path dropping.Dropping --model.teacher_weights random"
    " --model.auxiliary_head nonlinear --model.gradient_alignment all --data.train_per_class 20"
    " --trainer.max_epochs 4 --trainer.check_val_every_n_epoch 1 --trainer.enable_progress_bar false"
    " --trainer.enable_model_summary false --trainer.accelerator cpu"
)


def fit(folder, run, *options, **environment):
    return run_command("fit", "--run", run, *OPTIONS.split(), *options, folder=folder, **environment)


def fit_in_new_interpreter(folder, run, **environment):
    """In a process that shares nothing with the tests, as a user starts it."""
    return subprocess.run(
        [sys.executable, "-m", "lightning_kd", "fit", "--run", run, *OPTIONS.split()],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": THREADS, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_killed_and_resumed_run_equals_an_undisturbed_one_to_the_bit(tmp_path):
    (tmp_path / "dropping.py").write_text(NETWORK)
    whole = fit(tmp_path, "whole")
    assert whole.returncode == 0, whole.stderr
    # 200 samples in batches of 25: step 20 is in the middle of epoch 2
    killed = fit_in_new_interpreter(tmp_path, "broken", KILL_AT="20")
    assert killed.returncode == -signal.SIGKILL
    folder = RunFolder(tmp_path / "broken")
    assert json.loads(folder.record_file.read_text())["outcome"] == "running"
    assert torch.load(folder.last, weights_only=True)["epoch"] == 1
    # epochs 2 and 3 have 16 steps: a process that started at an earlier epoch would be killed at step 17
    resumed = fit(tmp_path, "broken", "--ckpt_path", "last", KILL_AT="17")
    assert resumed.returncode == 0, resumed.stderr
    a, b = (torch.load(tmp_path / run / "checkpoints/last.ckpt", weights_only=True) for run in ("whole", "broken"))
    assert a["global_step"] == b["global_step"] == 32
    assert a["state_dict"].keys() == b["state_dict"].keys()
    for key, value in a["state_dict"].items():
        assert torch.equal(value, b["state_dict"][key]), key
    for x, y in zip(
        a["optimizer_states"][0]["state"].values(), b["optimizer_states"][0]["state"].values(), strict=True
    ):
        assert torch.equal(x["momentum_buffer"], y["momentum_buffer"])
    assert (tmp_path / "whole/metrics.csv").read_text() == (tmp_path / "broken/metrics.csv").read_text()
    best = [torch.load(tmp_path / r / "checkpoints/best.ckpt", weights_only=True) for r in ("whole", "broken")]
    assert best[0]["epoch"] == best[1]["epoch"]


def test_ctrl_c_prints_the_command_to_resume(tmp_path):
    (tmp_path / "dropping.py").write_text(NETWORK.replace("SIGKILL", "SIGINT"))
    stopped = fit(tmp_path, "stopped", KILL_AT="12")
    assert stopped.returncode != 0
    assert "fit interrupted after 1 epoch" in stopped.stdout
    assert "go on with: lightning-kd fit --run stopped --config distillation/dhkd_digits" in stopped.stdout
    assert stopped.stdout.rstrip().endswith("--ckpt_path last")
    assert json.loads((tmp_path / "stopped/run.json").read_text())["outcome"] == "interrupted"


class GivesNaN(nn.Module):
    """Outputs NaN from training step ``step`` on, counted from 1."""

    def __init__(self, step: int = 3):
        super().__init__()
        self.linear, self.step, self.seen = nn.Linear(64, 10), step, 0

    def forward(self, x):
        self.seen += self.training
        return self.linear(x.flatten(1)) * (float("nan") if self.training and self.seen >= self.step else 1.0)


@pytest.mark.parametrize("step", [2, 15])
def test_nan_stops_at_once_and_leaves_a_usable_checkpoint(tmp_path, step):
    data = DigitsDataModule(train_per_class=20, batch_size=20)
    task = Classification(GivesNaN(step), 10, input_shape=(1, 8, 8))
    run = RunFolder(tmp_path)
    trainer = L.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=RunLogger(tmp_path),
        callbacks=run_callbacks(run),
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with pytest.raises(
        RuntimeError, match=rf"not finite at step {step - 1} \(epoch {(step - 1) // 10}\): loss nan, larg"
    ):
        trainer.fit(task, data)
    assert task.network.seen == step
    last = torch.load(run.last, weights_only=True)
    assert last["global_step"] == (step - 1) // 10 * 10
    assert all(value.isfinite().all() for value in last["state_dict"].values() if value.is_floating_point())
    # a network without the fault resumes from this checkpoint
    healthy = Classification(GivesNaN(10**6), 10, input_shape=(1, 8, 8))
    trainer = L.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(healthy, data, ckpt_path=run.last, weights_only=True)
    assert trainer.global_step == 30


def test_same_seed_gives_equal_weights_and_another_seed_others(tmp_path):
    weights = []
    for i, seed in enumerate((0, 0, 1)):
        main(
            [
                "fit",
                "--config",
                "distillation/student_digits",
                "--config",
                "_overlay/smoke",
                "--run",
                f"r{i}",
                "--seed_everything",
                str(seed),
                "--trainer.enable_progress_bar",
                "false",
            ]
        )
        weights.append(torch.load(tmp_path / f"r{i}/network.pt", weights_only=True))
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    assert not all(torch.equal(weights[0][k], weights[2][k]) for k in weights[0])


def test_logger_keeps_earlier_rows_and_drops_the_repeated_epoch(tmp_path):
    first = RunLogger(tmp_path)
    for epoch in range(3):
        first.log_metrics({"epoch": epoch, "val/acc": epoch / 10}, step=epoch * 5)
        first.log_metrics({"epoch": epoch, "train/loss": 1.0}, step=epoch * 5)
    second = RunLogger(tmp_path)
    second.begin(2)
    second.log_metrics({"epoch": 2, "val/acc": 0.9, "val/new": 3.0}, step=10)
    with (tmp_path / "metrics.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["val/acc"] for row in rows] == ["0.0", "0.1", "0.9"]
    assert [row["train/loss"] for row in rows] == ["1.0", "1.0", ""]
    assert [row["val/new"] for row in rows] == ["", "", "3.0"]
    assert not list(tmp_path.glob("*.partial"))


def test_result_of_an_earlier_checkpoint_gets_a_row_with_its_step(tmp_path):
    logger = RunLogger(tmp_path)
    for epoch in range(2):
        logger.log_metrics({"epoch": epoch, "val/acc": 0.5}, step=epoch * 5 + 4)
    logger.evaluated = (0, 5)  # the epoch and the number of steps done; rows count steps from 0
    logger.log_metrics({"epoch": 0, "test/acc": 0.4})
    assert [(row["epoch"], row["step"]) for row in logger.rows] == [(0, 4), (1, 9), (0, 4)]


def test_a_write_that_fails_leaves_the_old_files(tmp_path, monkeypatch):
    logger, folder = RunLogger(tmp_path), RunFolder(tmp_path)
    logger.log_metrics({"epoch": 0, "val/acc": 0.5}, step=1)
    folder.begin("fit", "lightning-kd fit", 0)
    before = {path: path.read_text() for path in (logger.file, folder.record_file)}

    def broken(*args):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", broken)
    with pytest.raises(OSError, match="disk full"):
        logger.log_metrics({"epoch": 1, "val/acc": 0.6}, step=2)
    with pytest.raises(OSError, match="disk full"):
        folder.end("finished")
    assert {path: path.read_text() for path in before} == before


class Slow(L.Callback):
    """Delays rank 1 by a second."""

    def on_train_start(self, trainer, pl_module):
        if trainer.global_rank == 1:
            time.sleep(1)


def fit_with_a_slow_rank(folder):
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        logger=RunLogger(folder),
        callbacks=[Slow(), *run_callbacks(RunFolder(folder))],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classification("cnn_tiny", 10, input_shape=(1, 8, 8)), DigitsDataModule(fake=True))
    return trainer.global_step


def test_a_fit_with_a_slow_rank_ends(tmp_path):
    steps = on_two_ranks(fit_with_a_slow_rank, str(tmp_path))
    assert steps[0] == steps[1] > 0
    assert RunFolder(tmp_path).last.is_file()
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 2
