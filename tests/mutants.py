"""Small faults that the tests must catch: ``make mutants``, by hand, before a large change of the tests and after it.

Each fault of ``mutants_list.py`` is put into a copy of the repository, the tests that should notice it are run there,
and the fault is taken out again. At the end the tests that noticed run once more on the sound code, where they must
pass, and the faults that no test noticed are printed: each needs a test, or a sentence in the list that says why it
does no harm. Exit status 1 if any is left.

    python tests/mutants.py [--only WORD] [--tests FOLDER] [--root FOLDER] [--jobs 2] [--harmless]

Older tests run with ``--tests``, and where the package has changed since, together with their own code by ``--root``.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
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
PARTS = ["lightning_kd", "configs", "notebooks", "docs", "tests"]
PARTS += ["README.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "pyproject.toml"]
CAUGHT, SURVIVED, BROKEN = "caught", "SURVIVED", "BROKEN"  # the last: the tool could not tell


def copy_repository(root: Path, folder: Path, tests: Path) -> None:
    """Copy what the tests need; they import the package of the copy."""
    for part in PARTS:
        source = tests if part == "tests" else root / part
        if source.is_dir():
            shutil.copytree(source, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / part)
    _, package = python(folder, "-c", "import lightning_kd; print(lightning_kd.__file__)")
    assert package.strip() == str(folder / "lightning_kd" / "__init__.py"), package


def applies(root: Path, mutant: Mutant) -> bool:
    path = root / "lightning_kd" / mutant.file
    return path.is_file() and path.read_text().count(mutant.old) == 1


def python(folder: Path, *args: str, limit: float = 600) -> tuple[int | None, str]:
    """Exit status and output of Python on the package in ``folder``; ``None`` where it was ended at the limit."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, *args],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that the tests started
            return None, ""
    return process.returncode, output


def pytest(folder: Path, *args: str, limit: float = 600) -> tuple[int | None, str]:
    return python(folder, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *args, limit=limit)


def failures(output: str) -> list[str]:
    return re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, re.MULTILINE)


def run_tests(folder: Path, mutant: Mutant, limit: float) -> tuple[str, str]:
    """Whether a test noticed, and which."""
    tests = [test for test in mutant.tests if (folder / test.partition("::")[0]).exists()]
    if not tests:
        return BROKEN, f"none of {', '.join(mutant.tests)} is there"
    statuses = set()
    for test in tests:  # one by one: pytest would put a file into the order of its folder
        status, output = pytest(folder, "-x", test, limit=limit)
        if status is None:
            return CAUGHT, "timeout"
        found = failures(output)
        if status in (1, 2) and found:  # 2: a file that could not be imported
            return CAUGHT, found[0]
        if status not in (0, 5):  # 5: all tests of the file are slow
            return BROKEN, f"pytest ended with {status}\n{output}"
        statuses.add(status)
    return (SURVIVED, "") if 0 in statuses else (BROKEN, f"no test in {', '.join(tests)}")


def try_mutant(folders: Queue[Path], mutant: Mutant, limit: float) -> tuple[str, str]:
    """Put the fault in, run the tests, take it out; the outcome, and the test that noticed."""
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
    return outcome, test


def fail_anyway(folder: Path, tests: set[str]) -> list[str]:
    """Those of ``tests`` that fail on sound code as well, and so prove nothing."""
    there = sorted(test for test in tests if test != "timeout")
    return failures(pytest(folder, *there, limit=3600)[1]) if there else []


def main() -> int:
    parser = argparse.ArgumentParser(description="Put small faults into a copy and see whether the tests notice.")
    parser.add_argument("--only", default="", help="faults with this word in their name or file")
    parser.add_argument("--tests", type=Path, help="another folder of tests, to compare two")
    parser.add_argument("--root", type=Path, default=ROOT, help="another checkout, whose code and tests are taken")
    parser.add_argument("--jobs", type=int, default=2, help="how many at once")
    parser.add_argument("--limit", type=float, default=400, help="seconds for the tests of one fault")
    parser.add_argument("--harmless", action="store_true", help="those that the list calls harmless instead")
    args = parser.parse_args()
    chosen = [m for m in MUTANTS if args.only in f"{m.name} {m.file}" and bool(m.harmless) == args.harmless]
    stale = [m for m in chosen if not applies(args.root, m)]
    if args.root != ROOT:
        print(f"left out, as other code lacks the place: {[m.name for m in stale]}", flush=True)
        chosen, stale = [m for m in chosen if m not in stale], []
    if stale or not chosen:
        print(f"not found exactly once in the code: {[m.name for m in stale]}" if stale else "no such fault")
        return 1
    with tempfile.TemporaryDirectory() as place:
        folders: Queue[Path] = Queue()
        for number in range(args.jobs):
            copy_repository(args.root, Path(place) / str(number), (args.tests or args.root / "tests").resolve())
            folders.put(Path(place) / str(number))
        with ThreadPoolExecutor(args.jobs) as pool:
            outcomes = list(pool.map(lambda mutant: try_mutant(folders, mutant, args.limit), chosen))
        void = fail_anyway(folders.get(), {test for outcome, test in outcomes if outcome == CAUGHT})
    survivors = [m for m, (outcome, _) in zip(chosen, outcomes, strict=True) if outcome == SURVIVED]
    wrong = [m.name for m, (outcome, test) in zip(chosen, outcomes, strict=True) if outcome == BROKEN or test in void]
    print(f"{len(chosen) - len(survivors) - len(wrong)} of {len(chosen)} faults caught")
    if wrong:
        print(f"not known, as tests could not run or fail on sound code too: {wrong}, {void}")
    for mutant in survivors:
        print(f"\nSURVIVED {mutant.name}, lightning_kd/{mutant.file}\n- {mutant.old}\n+ {mutant.new}")
    return int(bool(survivors or wrong))


if __name__ == "__main__":
    sys.exit(main())
