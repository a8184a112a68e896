"""Fits by the real command that end by SIGKILL in a training pass of choice."""

from __future__ import annotations

from pathlib import Path
from subprocess import CompletedProcess

from tests.forked import run_command

NETWORK = """
import os, signal
from torch import nn


class Dropping(nn.Module):
    \"\"\"Has dropout and batch norm; kills its process in the training pass KILL_AT of all of its kind.\"\"\"

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


def fit_dropping(folder: Path, run: str, arguments: str, *options: str, kill_at: int = -1) -> CompletedProcess[str]:
    """``lightning-kd fit`` of the network ``dropping.Dropping`` in ``folder``, on the CPU, in a forked process."""
    (folder / "dropping.py").write_text(NETWORK)
    words = f"{arguments} --model.network.class_path dropping.Dropping --trainer.accelerator cpu"
    words += " --trainer.enable_progress_bar false --trainer.enable_model_summary false"
    return run_command("fit", "--run", run, *words.split(), *options, folder=folder, KILL_AT=str(kill_at))
