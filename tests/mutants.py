"""Small faults that the tests must catch: ``make mutants``, by hand, before a large change of the tests and after it.

Each fault of ``mutants_list.py`` is put into a copy of the repository, the tests that should notice it are run there,
and the fault is taken out again. Faults that no test notices are printed at the end: each needs a test, or a sentence
in the list that says why it does no harm.

    python tests/mutants.py [--only WORD] [--tests FOLDER] [--jobs 2] [--harmless]
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.mutants_list import MUTANTS, Mutant

ROOT = Path(__file__).parent.parent
PARTS = ["lightning_kd", "configs", "notebooks", "tests", "README.md", "CONTRIBUTING.md", "Makefile", "pyproject.toml"]
CAUGHT, SURVIVED = "caught", "SURVIVED"


def copy_repository(folder: Path, tests: Path) -> None:
    """A copy whose package is the one that its tests import."""
    for part in PARTS:
        source = tests if part == "tests" else ROOT / part
        if source.is_dir():
            shutil.copytree(source, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / part)


def run_tests(folder: Path, mutant: Mutant, limit: float) -> tuple[str, str]:
    """Whether a test noticed, and which."""
    tests = [test for test in mutant.tests if (folder / test.partition("::")[0]).exists()]
    if not tests:
        raise SystemExit(f"{mutant.name}: none of {', '.join(mutant.tests)} is there")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider", *tests]
    environment = {
        **os.environ,
        "PYTHONPATH": str(folder),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=limit, start_new_session=True
        )
    except subprocess.TimeoutExpired:
        return CAUGHT, "a test that never ended"
    if done.returncode == 0:
        return SURVIVED, ""
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    if done.returncode not in (1, 2) or found is None:  # 2: a file that could not be imported
        raise SystemExit(f"{mutant.name}: pytest ended with {done.returncode}\n{done.stdout}{done.stderr}")
    return CAUGHT, found[1]


def try_mutant(folders: Queue[Path], mutant: Mutant, limit: float) -> str:
    """Put the fault in, run the tests, take it out; the outcome."""
    folder, start = folders.get(), time.perf_counter()
    path = folder / "lightning_kd" / mutant.file
    sound = path.read_text()
    try:
        path.write_text(sound.replace(mutant.old, mutant.new))
        outcome, test = run_tests(folder, mutant, limit)
    finally:
        path.write_text(sound)
        folders.put(folder)
    seconds = time.perf_counter() - start
    print(f"{outcome:<9}{seconds:4.0f} s  {mutant.name}{f'  [{test}]' if test else ''}", flush=True)
    return outcome


def main() -> int:
    parser = argparse.ArgumentParser(description="Put small faults into a copy and see whether the tests notice.")
    parser.add_argument("--only", default="", help="faults with this word in their name or file")
    parser.add_argument("--tests", type=Path, default=ROOT / "tests", help="another folder of tests, to compare two")
    parser.add_argument("--jobs", type=int, default=2, help="how many at once")
    parser.add_argument("--limit", type=float, default=400, help="seconds for the tests of one fault")
    parser.add_argument("--harmless", action="store_true", help="those that the list calls harmless instead")
    args = parser.parse_args()
    chosen = [m for m in MUTANTS if args.only in f"{m.name} {m.file}" and bool(m.harmless) == args.harmless]
    stale = [m.name for m in chosen if (ROOT / "lightning_kd" / m.file).read_text().count(m.old) != 1]
    if stale or not chosen:
        print(f"not found exactly once in the code, so no fault any more: {stale}" if stale else "no such fault")
        return 1
    with tempfile.TemporaryDirectory() as place:
        folders: Queue[Path] = Queue()
        for number in range(args.jobs):
            copy_repository(Path(place) / str(number), args.tests)
            folders.put(Path(place) / str(number))
        with ThreadPoolExecutor(args.jobs) as pool:
            outcomes = list(pool.map(lambda mutant: try_mutant(folders, mutant, args.limit), chosen))
    survivors = [m for m, outcome in zip(chosen, outcomes, strict=True) if outcome == SURVIVED]
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} faults caught")
    for mutant in survivors:
        print(f"\nSURVIVED {mutant.name}, lightning_kd/{mutant.file}\n- {mutant.old}\n+ {mutant.new}")
    return int(bool(survivors))


if __name__ == "__main__":
    sys.exit(main())
