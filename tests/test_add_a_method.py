"""The example of a new method in CONTRIBUTING.md works: three files are all that it takes."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT

BLOCK = re.compile(r"^```(?:python|yaml)\n# (\S+/\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILES = dict(BLOCK.findall((ROOT / "CONTRIBUTING.md").read_text()))
NAME = "logit_mse"
CONFIG = f"distillation/{NAME}_digits"
COMMANDS = f"""
from lightning_kd.cli import main
main(["list"])
main("fit --config {CONFIG} --config _overlay/smoke --model.teacher_weights random".split())
import pytest
alone = ["-n", "0", "-p", "no:cacheprovider"]
raise SystemExit(pytest.main([*alone, "-k", "{NAME}", "tests/distillation/test_{NAME}.py", "tests/test_configs.py"]))
"""


@pytest.fixture
def copy(tmp_path):
    """A copy of the repository with the files of the example added."""
    for folder in ("lightning_kd", "configs", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for path, text in FILES.items():
        assert not (ROOT / path).exists(), f"{path} exists: take another name for the example"
        (tmp_path / path).write_text(text)
    return tmp_path


def python_in_copy(copy, *args):
    return subprocess.run(
        [sys.executable, *args],
        capture_output=True,
        text=True,
        cwd=copy,
        env={**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"},
        timeout=300,
    )


def test_example_in_contributing_has_three_files_of_at_most_60_lines():
    assert list(FILES) == [
        f"lightning_kd/distillation/{NAME}.py",
        f"configs/{CONFIG}.yaml",
        f"tests/distillation/test_{NAME}.py",
    ]
    lines = [line for text in FILES.values() for line in text.splitlines() if line.strip()]
    assert len(lines) <= 60


def test_method_of_three_files_is_listed_trained_and_tested(copy):
    done = python_in_copy(copy, "-c", COMMANDS)
    assert done.returncode == 0, done.stdout + done.stderr
    listed, _, fitted = done.stdout.partition("configs:")
    assert re.search(r"^  LogitMSE +Regression on the teacher's logits \(Ba and Caruana", listed, re.MULTILINE)
    assert re.search(rf"^  {CONFIG} +LogitMSE, regression on logits", fitted, re.MULTILINE)
    assert "fit finished after 2 epochs" in fitted
    assert (copy / f"runs/{NAME}_digits/student.pt").is_file()
    # the test of the example, and those of tests/test_configs.py for its config
    assert int(re.search(r"^(\d+) passed", fitted, re.MULTILINE)[1]) >= 2, fitted


def test_example_passes_lint(copy):
    paths = [path for path in FILES if path.endswith(".py")]
    for command in (["check"], ["format", "--check"]):
        done = python_in_copy(copy, "-m", "ruff", *command, "--no-cache", *paths)
        assert done.returncode == 0, done.stdout + done.stderr
