"""The notebooks run, and those in the repository hold the outputs of a whole run."""

import re
import subprocess
import sys

import nbformat
import pytest

from tests.conftest import ROOT
from tests.forked import run_forked

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MACHINE_PATH = re.compile(r"(?<![\w.:/])/(home|root|tmp|usr|opt|var|mnt|work|Users)/|[A-Z]:\\")


def run_cells(path):
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell.instance()
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            shell.run_cell(cell.source).raise_error()


LONG = ("03", "05")


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[pytest.mark.slow] * path.stem.startswith(LONG)) for path in NOTEBOOKS],
    ids=lambda path: path.stem,
)
def test_notebook_runs_in_the_fast_setting(path, tmp_path):
    kernel = {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "IPYTHONDIR": str(tmp_path)}
    done = run_forked(run_cells, path, folder=tmp_path, LIGHTNING_KD_FAST="1", **kernel)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_notebook_was_executed_and_names_no_path_of_a_machine(path):
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


def test_run_script_uses_a_kernel_for_each_notebook_and_shows_failures(tmp_path):
    fast = "import os\nassert os.environ['LIGHTNING_KD_FAST'] == '1'"
    for name, code in (("good", [fast, "assert os"]), ("broken", [fast, "print(1 / 0)"])):
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(line) for line in code])
        nbformat.write(notebook, tmp_path / f"{name}.ipynb")
    before = (tmp_path / "good.ipynb").read_bytes()
    done = subprocess.run(
        [sys.executable, ROOT / "notebooks" / "run.py", "good.ipynb", "broken.ipynb"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1
    good, broken, *rest = done.stdout.splitlines()
    assert re.fullmatch(r"good.ipynb: \d+ s, ok", good)
    assert re.fullmatch(r"broken.ipynb: \d+ s, failed", broken)
    assert "print(1 / 0)" in "".join(rest)
    assert "ZeroDivisionError" in "".join(rest)
    assert (tmp_path / "good.ipynb").read_bytes() == before
