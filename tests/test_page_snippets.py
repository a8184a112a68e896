"""The Python blocks of README and of the pages in docs run as they stand, those of a page one after another."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_kd.cli import main
from lightning_kd.nets import build_network
from tests.conftest import ROOT

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
WITH_PYTHON = [page for page in PAGES if BLOCK.search((ROOT / page).read_text())]


@pytest.fixture
def files(tmp_path):
    """Files that the pages assume: weights of a teacher, and predictions to choose from."""
    Path("runs/teacher_digits").mkdir(parents=True)
    torch.save(build_network("cnn", 10, in_channels=1).state_dict(), "runs/teacher_digits/network.pt")
    Path("runs/strong").mkdir()
    rows = [f'"a, {k}.png",{name}' for name in ("cat", "dog") for k in range(1100)]
    Path("runs/strong/predictions.csv").write_text("\n".join(["path,class_name", *rows]))


def train_on_photos():
    """Make a run on images, and two new images."""
    random = np.random.default_rng(0)
    for path in [*(f"photos/{name}/{k}.png" for name in ("cat", "dog") for k in range(6)), "a.jpg", "b.jpg"]:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(path)
    words = ["--model", "Classification", "--model.network", "cnn_tiny", "--data", "ImageFolderDataModule"]
    words += ["--data.root", "photos", "--data.image_size", "16", "--trainer.max_epochs", "1", "--run", "runs/photos"]
    main(["fit", *words, "--trainer.enable_progress_bar", "false"])


@pytest.mark.parametrize("page", WITH_PYTHON)
def test_python_blocks_run(page, files, monkeypatch):
    text = (ROOT / page).read_text()
    monkeypatch.setattr(sys, "argv", ["notebook"])
    if "runs/photos" in "".join(BLOCK.findall(text)):
        train_on_photos()
    names = {"__name__": "page"}
    for block in BLOCK.finditer(text):
        line = text.count("\n", 0, block.start()) + 1  # so that an error names the line of the page
        exec(compile("\n" * line + block[1], page, "exec"), names)
    if page == "docs/distil.md":
        lines = Path("surest.csv").read_text().splitlines()
        assert (len(lines), lines[1], lines[-1]) == (2001, '"a, 0.png",cat', '"a, 999.png",dog')


def test_pages_with_python_blocks_are_found():
    assert {"docs/distil.md", "docs/your_method.md", "docs/running.md"} <= {*WITH_PYTHON}
