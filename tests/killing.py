"""Fits through the real command that end by SIGKILL in a training pass of choice."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

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


def fit_dropping(folder: Path, run: str, arguments: str, *options: str, kill_at: int = -1) -> Any:
    """``lightning-kd fit`` of the network ``dropping.Dropping`` in ``folder``, on the CPU."""
    (folder / "dropping.py").write_text(NETWORK)
    words = f"{arguments} --model.network.class_path dropping.Dropping --trainer.accelerator cpu"
    words += " --trainer.enable_progress_bar false --trainer.enable_model_summary false"
    return subprocess.run(
        [sys.executable, "-m", "lightning_kd", "fit", "--run", run, *words.split(), *options],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "KILL_AT": str(kill_at)},
        capture_output=True,
        text=True,
        timeout=300,
    )
