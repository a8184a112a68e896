"""Shared by all tests: few threads, no stray seeds, an empty working folder."""

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(int(os.environ.get("TEST_THREADS", "1")))  # two test processes share two cores
ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _isolated(monkeypatch, tmp_path):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
