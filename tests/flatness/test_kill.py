"""SAM with a shift after every epoch, killed in the second evaluation of a step and resumed by the real command."""

import json
import os
import signal
import subprocess
import sys

import torch

NETWORK = """
import os, signal
from torch import nn


class Dropping(nn.Module):
    \"\"\"Has dropout and batch norm; kills its process in the training pass KILL_AT.\"\"\"

    passes = 0

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3))
        self.head = nn.Linear(8 * 36, 10)

    def forward(self, x):
        if self.training:
            Dropping.passes += 1
            if Dropping.passes == int(os.environ.get("KILL_AT", -1)):
                os.kill(os.getpid(), signal.SIGKILL)
        return self.head(self.body(x))
"""


def fit(folder, run, *options, **environment):
    arguments = "--config flatness/sam_digits --model.network.class_path dropping.Dropping --data.train_per_class 20"
    arguments += " --data.batch_size 25 --trainer.max_epochs 4 --trainer.accelerator cpu"
    arguments += " --trainer.callbacks+ lightning_kd.flatness.OptimumShifting --trainer.callbacks.every 1"
    arguments += " --trainer.callbacks.start 0 --trainer.callbacks.guard null --trainer.callbacks.held_out 40"
    arguments += " --trainer.enable_progress_bar false --trainer.enable_model_summary false"
    return subprocess.run(
        [sys.executable, "-m", "lightning_kd", "fit", "--run", run, *arguments.split(), *options],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_sigkill_between_the_evaluations_of_a_step(tmp_path):
    (tmp_path / "dropping.py").write_text(NETWORK)
    whole = fit(tmp_path, "whole")
    assert whole.returncode == 0, whole.stderr
    # 8 steps of two passes an epoch: the 40th is the second one of a step in the third epoch
    killed = fit(tmp_path, "broken", KILL_AT="40")
    assert killed.returncode == -signal.SIGKILL
    assert torch.load(tmp_path / "broken/checkpoints/last.ckpt", weights_only=True)["epoch"] == 1
    resumed = fit(tmp_path, "broken", "--ckpt_path", "last")
    assert resumed.returncode == 0, resumed.stderr
    a, b = (torch.load(tmp_path / run / "checkpoints/last.ckpt", weights_only=True) for run in ("whole", "broken"))
    assert a["global_step"] == b["global_step"] == 32
    for key, value in a["state_dict"].items():
        assert torch.equal(value, b["state_dict"][key]), key
    for x, y in zip(*(c["optimizer_states"][0]["state"].values() for c in (a, b)), strict=True):
        assert torch.equal(x["momentum_buffer"], y["momentum_buffer"])
    shifts = [json.loads((tmp_path / run / "shifts.json").read_text()) for run in ("whole", "broken")]
    assert shifts[0] == shifts[1]
    assert [shift["epoch"] for shift in shifts[0]] == [0, 1, 2, 3]
    assert all(shift["layers"][0]["status"] == "shifted" for shift in shifts[0])
    assert (tmp_path / "whole/metrics.csv").read_text() == (tmp_path / "broken/metrics.csv").read_text()
