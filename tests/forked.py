"""Processes forked from one that has imported everything: like new ones, without the seconds of imports."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryDirectory
from typing import Any

THREADS = os.environ.get("TEST_THREADS", "1")  # of each process: the suite runs two at once on two cores
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["lightning_kd.cli.run_cli", "sklearn.datasets", "matplotlib.pyplot"])


def _child(
    function: Callable[..., Any], args: tuple[Any, ...], folder: Path, environment: Mapping[str, str], output: Path
) -> None:
    for number in (1, 2):
        os.dup2(os.open(output / str(number), os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it
    import torch

    torch.set_num_threads(int(THREADS))
    try:
        function(*args)
    except Exception:  # end as the interpreter does
        traceback.print_exc()
        sys.exit(1)


def run_forked(
    function: Callable[..., Any], *args: Any, folder: Path, timeout: float = 120, **environment: str
) -> CompletedProcess[str]:
    """``function(*args)`` in a process of its own that works in ``folder``, as ``subprocess.run`` would give it.

    The process dies by any signal that it sends itself, SIGKILL too; ``function`` must be importable.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": THREADS, **environment}
    with TemporaryDirectory() as output:
        child = CONTEXT.Process(target=_child, args=(function, args, Path(folder), environment, Path(output)))
        child.start()
        child.join(timeout)
        if child.exitcode is None:
            child.kill()
            raise TimeoutError(f"{args} did not end in {timeout:.0f} s")
        out, err = ((Path(output) / str(number)).read_text() for number in (1, 2))
    return CompletedProcess(args, child.exitcode, out, err)


def run_command(*words: Any, folder: Path, **environment: str) -> CompletedProcess[str]:
    """``lightning-kd WORDS`` in a forked process."""
    from lightning_kd.cli import main

    return run_forked(main, [str(word) for word in words], folder=folder, **environment)
