"""The jobs of a claim in processes of their own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightning_kd.claims.run_processes import Job, run_jobs
from tests.forked import CONTEXT  # noqa: F401  (sets the modules that forked processes begin with)


def record_call(words):
    """Append the word to order.txt; ``fail`` ends with an error, ``die`` kills its process."""
    with open("order.txt", "a") as file:
        file.write(f"{words[0]} {os.environ['OMP_NUM_THREADS']}\n")
    print(f"this is {words[0]}")
    if words[0] == "fail":
        print("error: it broke", file=sys.stderr)
        sys.exit(1)
    if words[0] == "die":
        os.kill(os.getpid(), signal.SIGKILL)


def job(name, *commands, after=()):
    return Job(name, [[word] for word in commands or (name,)], Path(f"logs/{name}.txt"), list(after))


def test_job_waits_for_the_jobs_it_needs():
    finished = []
    jobs = [job("teacher"), job("student", "fit", "test", after=["teacher"]), job("late", after=["elsewhere"])]
    run_jobs(jobs, 3, record_call, lambda job, seconds: finished.append(job.name))
    lines = Path("order.txt").read_text().splitlines()
    assert sorted(lines) == ["fit 1", "late 1", "teacher 1", "test 1"]
    assert lines.index("teacher 1") < lines.index("fit 1") < lines.index("test 1")
    assert sorted(finished) == ["late", "student", "teacher"]
    assert Path("logs/student.txt").read_text() == "this is fit\nthis is test\n"


@pytest.mark.parametrize(("name", "words"), [("fail", "fail failed: it broke"), ("die", "die failed: ")])
def test_no_job_begins_after_one_has_failed(name, words):
    with pytest.raises(RuntimeError, match=f"^{words}.*logs/{name}.txt"):
        run_jobs([job(name), job("other")], 1, record_call)
    assert Path("order.txt").read_text() == f"{name} 1\n"


SLEEPING = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, os.getcwd())
from lightning_kd.claims.run_processes import Job, run_jobs
import sleeper
if __name__ == "__main__":
    run_jobs([Job("one", [["x"]], Path("log.txt"))], 1, sleeper.sleep)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_running_job_ends_when_the_claim_is_killed(tmp_path):
    Path("sleeper.py").write_text(
        "import os, time\n\n\ndef sleep(words):\n    open('pid', 'w').write(str(os.getpid()))\n    time.sleep(60)\n"
    )
    Path("main.py").write_text(SLEEPING)
    process = subprocess.Popen([sys.executable, "main.py"])
    try:
        deadline = time.monotonic() + 60
        while not (Path("pid").is_file() and Path("pid").read_text()):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    run = int(Path("pid").read_text())
    while time.monotonic() < deadline and _lives(run):
        time.sleep(0.05)
    assert not _lives(run)


def _lives(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
