"""For every test: few threads, a fixed seed and none of the environment, an empty working folder."""

from pathlib import Path

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader

from tests.forked import THREADS

torch.set_num_threads(int(THREADS))
ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _isolated(monkeypatch, tmp_path):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    # Lightning patches these while it builds loaders, and leaves them patched if that raises
    for cls in (DataLoader, BatchSampler):
        for name in ("__init__", "__setattr__", "__delattr__"):
            monkeypatch.setattr(cls, name, getattr(cls, name))
