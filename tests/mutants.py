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
import json
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
PARTS = ["lightning_kd", "configs", "notebooks", "docs", "tests"]
PARTS += ["README.md", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "Makefile", "mkdocs.yml"]
PARTS += ["pyproject.toml"]
CAUGHT, SURVIVED, BROKEN = "caught", "SURVIVED", "BROKEN"  # the last: the tool could not tell


def copy_repository(root: Path, folder: Path, tests: Path) -> None:
    """Copy what the tests need; they import the package of the copy."""
    for part in PARTS:
        source = tests if part == "tests" else root / part
        if source.is_dir():
            shutil.copytree(source, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / part)
    command = [sys.executable, "-c", "import lightning_kd; print(lightning_kd.__file__)"]
    package = subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": str(folder)}, capture_output=True)
    assert package.stdout.decode().strip() == str(folder / "lightning_kd" / "__init__.py"), package


def applies(root: Path, mutant: Mutant) -> bool:
    path = root / "lightning_kd" / mutant.file
    return path.is_file() and path.read_text().count(mutant.old) == 1


class Runner:
    """pytest on the package in ``folder``, in processes forked from one that has imported what does not change."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(Path(__file__).parent / "pytest_server.py")]
        self.server = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def pytest(self, *args: str, limit: float = 600) -> tuple[int | None, str]:
        """Exit status and output; the status is ``None`` where the tests were ended at the limit."""
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        output = self.folder / "pytest.log"
        self.server.stdin.write(json.dumps([str(output), limit, args]) + "\n")
        self.server.stdin.flush()
        status = json.loads(self.server.stdout.readline())
        return status, output.read_text(errors="replace")

    def close(self) -> None:
        self.server.communicate()


def failures(output: str) -> list[str]:
    return re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, re.MULTILINE)


def run_tests(runner: Runner, mutant: Mutant, limit: float) -> tuple[str, str]:
    """Whether a test noticed, and which."""
    tests = [test for test in mutant.tests if (runner.folder / test.partition("::")[0]).exists()]
    if not tests:
        return BROKEN, f"none of {', '.join(mutant.tests)} is there"
    statuses = set()
    for test in tests:  # one by one: pytest would put a file into the order of its folder
        status, output = runner.pytest("-x", test, limit=limit)
        if status is None:
            return CAUGHT, "timeout"
        found = failures(output)
        if status in (1, 2) and found:  # 2: a file that could not be imported
            return CAUGHT, found[0]
        if status not in (0, 5):  # 5: all tests of the file are slow
            return BROKEN, f"pytest ended with {status}\n{output}"
        statuses.add(status)
    return (SURVIVED, "") if 0 in statuses else (BROKEN, f"no test in {', '.join(tests)}")


def try_mutant(runners: Queue[Runner], mutant: Mutant, limit: float) -> tuple[str, str]:
    """Put the fault in, run the tests, take it out; the outcome, and the test that noticed."""
    runner, start = runners.get(), time.perf_counter()
    path = runner.folder / "lightning_kd" / mutant.file
    sound = path.read_text()
    try:
        path.write_text(sound.replace(mutant.old, mutant.new))
        outcome, test = run_tests(runner, mutant, limit)
    finally:
        path.write_text(sound)
        runners.put(runner)
    seconds = time.perf_counter() - start
    print(f"{outcome:<9}{seconds:4.0f} s  {mutant.name}{f'  [{test}]' if test else ''}", flush=True)
    return outcome, test


def fail_anyway(runner: Runner, tests: set[str]) -> list[str]:
    """Those of ``tests`` that fail on sound code as well, and so prove nothing."""
    there = sorted(test for test in tests if test != "timeout")
    return failures(runner.pytest(*there, limit=3600)[1]) if there else []


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
        runners: Queue[Runner] = Queue()
        for number in range(args.jobs):
            folder = Path(place) / str(number)
            copy_repository(args.root, folder, (args.tests or args.root / "tests").resolve())
            runners.put(Runner(folder))
        with ThreadPoolExecutor(args.jobs) as pool:
            outcomes = list(pool.map(lambda mutant: try_mutant(runners, mutant, args.limit), chosen))
        runner = runners.get()
        void = fail_anyway(runner, {test for outcome, test in outcomes if outcome == CAUGHT})
        for one in (runner, *(runners.get() for _ in range(args.jobs - 1))):
            one.close()
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
