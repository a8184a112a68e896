"""Runs pytest again and again in forked processes: what the tests import beside the package is imported once.

Each line that is read is ``[file for the output, limit in seconds, arguments]``; for each the exit status is written,
``null`` where the tests were ended at the limit. Used by ``mutants.py``, in a copy of the repository.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
import time
from typing import NoReturn

IMPORTED = ("torch", "lightning", "torchmetrics", "torchvision.models", "jsonargparse", "sklearn.datasets")
IMPORTED += ("matplotlib.pyplot", "pytest")


def main() -> None:
    sys.path[0] = os.getcwd()  # not the folder of this file
    for name in IMPORTED:
        importlib.import_module(name)
    for line in sys.stdin:
        output, limit, args = json.loads(line)
        process = os.fork()
        if not process:
            run(output, args)
        print(json.dumps(wait(process, limit)), flush=True)


def run(output: str, args: list[str]) -> NoReturn:
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = ["pytest", *args]
    status = 3  # pytest's for an error of its own
    try:
        status = int(sys.modules["pytest"].main(["-q", "-n", "0", "-p", "no:cacheprovider", *args]))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def wait(process: int, limit: float) -> int | None:
    """The exit status; all that the tests started is ended."""
    end, status = time.monotonic() + limit, None
    while status is None and time.monotonic() < end:
        ended, code = os.waitpid(process, os.WNOHANG)
        status = os.waitstatus_to_exitcode(code) if ended else None
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)
    if status is None:
        os.waitpid(process, 0)
    return status


if __name__ == "__main__":
    main()
