"""Running commands in separate processes, several at once, each with one thread."""

from __future__ import annotations

import multiprocessing
import multiprocessing.process
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

__all__ = ["Job", "error_in", "run_jobs"]

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass
class Job:
    """The commands of one run, which are called one after another in one process.

    Attributes:
        name: name of the run.
        commands: the words of each command.
        log: the file for everything that they print.
        after: names of the jobs that must have ended before this one starts.
    """

    name: str
    commands: list[list[str]]
    log: Path
    after: list[str] = field(default_factory=list)


def run_jobs(
    jobs: Sequence[Job],
    at_once: int,
    call: Callable[[list[str]], None],
    ended: Callable[[Job, float], None] = lambda job, seconds: None,
    preload: Sequence[str] = (),
) -> None:
    """Run all jobs, ``at_once`` of them at the same time.

    Args:
        jobs: the jobs, in the order in which they start; a job stands after those named in its ``after``.
        at_once: number of jobs at the same time.
        call: runs a command from its words, in the process of the job; it must be importable by its name.
        ended: called with each job that has ended and its seconds.
        preload: modules that are imported once, not in each job.

    Raises:
        RuntimeError: if a job failed, with its error and its log. Running jobs are waited for, no further ones start.
    """
    waiting, done, failed = list(jobs), set[str](), list[Job]()
    running: dict[Any, tuple[Any, Job, float]] = {}  # by the sentinel of the process
    names = {job.name for job in jobs}
    with _one_thread():
        context = _context(preload)
        try:
            while running or (waiting and not failed):
                ready = [job for job in waiting if names.intersection(job.after) <= done] if not failed else []
                for job in ready[: at_once - len(running)]:
                    job.log.parent.mkdir(parents=True, exist_ok=True)
                    process = context.Process(target=_work, args=(call, job.commands, str(job.log)))
                    process.start()
                    waiting.remove(job)
                    running[process.sentinel] = (process, job, time.monotonic())
                for sentinel in wait(list(running)):
                    process, job, start = running.pop(sentinel)
                    process.join()
                    if process.exitcode:
                        failed.append(job)
                    else:
                        done.add(job.name)
                        ended(job, time.monotonic() - start)
        finally:  # after an interruption, let each process record its outcome
            for process, _, _ in running.values():
                process.terminate()
            for process, _, _ in running.values():
                process.join()
    if failed:
        first = min(failed, key=jobs.index)
        raise RuntimeError(f"{first.name} failed: {error_in(first.log)} (all that it printed: {first.log})")


def error_in(log: Path) -> str:
    """The last error message in a log, without ``error:``; the last line if there is none."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (told or lines or ["it was killed"])[-1]


def _context(preload: Sequence[str]) -> Any:
    """The multiprocessing context: processes forked from a server that has imported everything, if possible."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    if preload:
        context.set_forkserver_preload(list(preload))
    return context


@contextmanager
def _one_thread() -> Iterator[None]:
    """A context in which started processes use one thread."""
    before = {name: os.environ.get(name) for name in _THREADS}
    os.environ.update(dict.fromkeys(_THREADS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _work(call: Callable[[list[str]], None], commands: list[list[str]], log: str) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    for number in (1, 2):
        os.dup2(descriptor, number)
    os.environ.update(dict.fromkeys(_THREADS, "1"))  # the fork server may have been started before
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    for words in commands:
        call(words)
        sys.stdout.flush()


def _end_with_parent() -> None:
    """End this process when its parent ends, even if it is killed: a run going on would lock its folder."""
    parent = multiprocessing.process.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
