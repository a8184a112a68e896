"""Signals that ask a command to stop end it as Ctrl-C does: with its outcome, and the command that goes on."""

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
    """Raised where a signal comes in; the process ends with status 128 and its number, as a shell says."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Raise ``Stopped`` inside on SIGTERM (of ``kill`` and cluster schedulers) and SIGHUP (of a terminal that closes).

    A signal that is ignored, as under ``nohup``, or that has a handler already is left alone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours, process = [number for number in _SIGNALS if signal.getsignal(number) == signal.SIG_DFL], os.getpid()

    def stop(number: int, frame: FrameType | None) -> Any:
        if os.getpid() != process:  # a worker of a loader, which inherits this
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        for other in ours:  # once is enough: what is being written is to be left in order
            signal.signal(other, signal.SIG_IGN)
        raise Stopped(number)

    for number in ours:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)
