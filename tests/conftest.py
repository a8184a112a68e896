"""Shared by all tests: few threads, no stray seeds, and a runner of the real command."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)
ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _isolated(monkeypatch, tmp_path):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


@pytest.fixture
def command(tmp_path):
    """The console command in a process of its own: ``command("fit", ...)`` gives the finished process."""

    def run(*args, **kwargs):
        return subprocess.run(
            [sys.executable, "-m", "lightning_kd", *map(str, args)],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            timeout=300,
            **kwargs,
        )

    return run
