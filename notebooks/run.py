"""Run the notebooks of this folder: ``python notebooks/run.py [--full] [NOTEBOOK ...]``.

They run in the fast setting, with few epochs, unless ``--full`` is given; the files themselves are not changed.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError


def run(path: Path, full: bool) -> None:
    """Execute one notebook, from its first cell, in a kernel of its own and an empty folder."""
    environment = {**os.environ, "LIGHTNING_KD_FAST": "" if full else "1"}
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            nbformat.read(path, as_version=4),
            kernel_name="python3",
            resources={"metadata": {"path": folder}},
            extra_arguments=["--log-level=ERROR"],  # or each kernel says that it has no encryption
        )
        client.execute(env=environment)


def main() -> int:
    parser = argparse.ArgumentParser(description="Run notebooks and say how long each took.")
    parser.add_argument("notebooks", nargs="*", type=Path, help="by default all of this folder")
    parser.add_argument("--full", action="store_true", help="all epochs, as in the committed outputs")
    args = parser.parse_args()
    failed = False
    for path in args.notebooks or sorted(Path(__file__).parent.glob("*.ipynb")):
        start = time.perf_counter()
        try:
            run(path, args.full)
            outcome = "ok"
        except CellExecutionError as error:
            failed, outcome = True, f"failed\n{error}"
        print(f"{path.name}: {time.perf_counter() - start:.0f} s, {outcome}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
