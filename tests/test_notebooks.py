"""The notebooks run, and those in the repository were run."""

import os
import re
import subprocess
import sys

import nbformat
import pytest

from tests.conftest import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MACHINE_PATH = re.compile(r"(?<![\w.:/])/(home|root|tmp|usr|opt|var|mnt|work|Users)/|[A-Z]:\\")


def run(path):
    return subprocess.run(
        [sys.executable, str(ROOT / "notebooks" / "run.py"), str(path)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_in_the_fast_setting(path):
    before = path.read_bytes()
    done = run(path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.fullmatch(rf"{path.name}: \d+ s, ok\n", done.stdout)
    assert path.read_bytes() == before


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_was_executed_and_names_no_machine(path):
    assert path.stat().st_size < 300_000
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert outputs
    assert all(output.output_type != "error" and output.get("name") != "stderr" for output in outputs)
    texts = [cell.source for cell in notebook.cells]
    texts += [output.get("text", "") for output in outputs]
    texts += [value for output in outputs for kind, value in output.get("data", {}).items() if kind.startswith("text/")]
    for text in texts:
        assert not MACHINE_PATH.search(text), text


def test_a_failing_cell_is_shown(tmp_path):
    code = ["import os", "assert os.environ['LIGHTNING_KD_FAST'] == '1'\nprint(1 / 0)"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(line) for line in code])
    nbformat.write(notebook, tmp_path / "broken.ipynb")
    done = run(tmp_path / "broken.ipynb")
    assert done.returncode == 1
    assert re.match(r"broken.ipynb: \d+ s, failed\n", done.stdout)
    assert "print(1 / 0)" in done.stdout
    assert "ZeroDivisionError" in done.stdout
