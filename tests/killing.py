"""Fits by the real command, killed by SIGKILL in a chosen training pass."""

from __future__ import annotations

from pathlib import Path
from subprocess import CompletedProcess

from tests.forked import run_command

NETWORK = """
import os, signal
from torch import nn


class Dropping(nn.Module):
    \"\"\"For images of 8 x 8 or more, with dropout and batch norm; kills its process in training pass KILL_AT.\"\"\"

    passes = 0

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveMaxPool2d(6))
        self.drop = nn.Sequential(nn.Flatten(), nn.Dropout(0.3))
        self.head = nn.Linear(8 * 36, 10)

    def forward(self, x):
        if self.training:
            Dropping.passes += 1
            if Dropping.passes == int(os.environ.get("KILL_AT", -1)):
                os.kill(os.getpid(), signal.SIGKILL)
        return self.head(self.drop(self.body(x)))
"""


def fit_dropping(
    folder: Path, run: str, arguments: str, *options: str, kill_at: int = -1, argument: str = "network"
) -> CompletedProcess[str]:
    """``lightning-kd fit`` of ``dropping.Dropping`` as ``model.ARGUMENT``, in ``folder``, on the CPU, forked."""
    (folder / "dropping.py").write_text(NETWORK)
    words = f"{arguments} --model.{argument}.class_path dropping.Dropping --trainer.accelerator cpu"
    words += " --trainer.enable_progress_bar false --trainer.enable_model_summary false"
    return run_command("fit", "--run", run, *words.split(), *options, folder=folder, KILL_AT=str(kill_at))
