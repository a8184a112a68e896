"""Stopping a command by SIGTERM or SIGHUP like by Ctrl-C: its outcome is recorded, and how to resume is printed."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

__all__ = ["Stopped", "stopped_by_signals"]

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


class Stopped(SystemExit):
    """Raised when a signal arrives; the process exits with status 128 + the signal's number, as shells expect."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """A context in which SIGTERM (``kill``, cluster schedulers) and SIGHUP (a closed terminal) raise ``Stopped``.

    Signals that are ignored, as under ``nohup``, or that have a handler already are not changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours, process = [number for number in _SIGNALS if signal.getsignal(number) == signal.SIG_DFL], os.getpid()

    def stop(number: int, frame: FrameType | None) -> Any:
        if os.getpid() != process:  # a worker process of a loader, which inherits this handler
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        for other in ours:  # a second signal must not interrupt the writing of the outcome
            signal.signal(other, signal.SIG_IGN)
        raise Stopped(number)

    for number in ours:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)
