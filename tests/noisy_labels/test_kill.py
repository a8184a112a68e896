"""A run of the semi-supervised stage that is killed and resumed through the real command equals an undisturbed one."""

import os
import signal
import subprocess
import sys

import numpy as np
import torch

NETWORK = """
import os, signal
from torch import nn


class Dropping(nn.Module):
    \"\"\"Has dropout and batch norm; kills its process in the training pass KILL_AT, counted over both networks.\"\"\"

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
    arguments = "--config noisy_labels/dpc_digits --model.network.class_path dropping.Dropping --model.head_width 16"
    arguments += " --model.warmup_epochs 1 --data.train_per_class 30 --data.batch_size 25 --trainer.max_epochs 3"
    arguments += " --trainer.enable_progress_bar false --trainer.enable_model_summary false --trainer.accelerator cpu"
    return subprocess.run(
        [sys.executable, "-m", "lightning_kd", "fit", "--run", run, *arguments.split(), *options],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_sigkill_in_the_semi_supervised_stage(tmp_path):
    (tmp_path / "dropping.py").write_text(NETWORK)
    whole = fit(tmp_path, "whole")
    assert whole.returncode == 0, whole.stderr
    # 12 training passes are the warm-up epoch; a semi-supervised step has 5 and an epoch of each network several
    killed = fit(tmp_path, "broken", KILL_AT="90")
    assert killed.returncode == -signal.SIGKILL
    reached = torch.load(tmp_path / "broken/checkpoints/last.ckpt", weights_only=True)
    assert 0 <= reached["epoch"] < 2
    assert (reached["memories"]["clean_probability"]["rows"] != 1).any()
    resumed = fit(tmp_path, "broken", "--ckpt_path", "last")
    assert resumed.returncode == 0, resumed.stderr
    a, b = (torch.load(tmp_path / run / "checkpoints/last.ckpt", weights_only=True) for run in ("whole", "broken"))
    assert a["global_step"] == b["global_step"]
    assert a["state_dict"].keys() == b["state_dict"].keys()
    for key, value in a["state_dict"].items():
        assert torch.equal(value, b["state_dict"][key]), key
    for one, two in zip(a["optimizer_states"], b["optimizer_states"], strict=True):
        for x, y in zip(one["state"].values(), two["state"].values(), strict=True):
            assert torch.equal(x["momentum_buffer"], y["momentum_buffer"])
    rows = [c["memories"]["clean_probability"]["rows"] for c in (a, b)]
    assert torch.equal(*rows)
    for name in ("metrics.csv", "noisy_labels.csv"):
        assert (tmp_path / "whole" / name).read_text() == (tmp_path / "broken" / name).read_text(), name
    given = [np.load(tmp_path / run / "noise.npz")["given"] for run in ("whole", "broken")]
    assert np.array_equal(*given)
    assert (tmp_path / "whole/pictures/label_scores.png").is_file()
