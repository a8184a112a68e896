"""Writing files so that they are never incomplete, locking folders, and clear errors if they cannot be written."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["alone", "disk_errors_naming", "open_lock", "remove_leftovers", "sentence_of", "write_text", "written_whole"]

_PART = re.compile(r"\..+\.[0-9a-f]{32}\.part")
_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)
_FULL = "as the disk is full: make room there, or name a folder on another disk"
_READ_ONLY = "as its folder may not be written: change its permissions, or name another folder"
_REASONS = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EROFS: _READ_ONLY,
    errno.EACCES: _READ_ONLY,
    errno.EPERM: _READ_ONLY,
}


@contextmanager
def written_whole(path: Path, durable: bool = False, tidy: bool = True) -> Iterator[Path]:
    """A context that gives a temporary file in the folder of ``path``, and renames it to ``path`` at its end.

    After an error the temporary file is removed and ``path`` is unchanged.

    Args:
        path: the file; folders above it are created.
        durable: wait until the data are on the disk, so that the file survives a power cut.
        tidy: first remove temporary files of killed processes in the folder; turn it off for many files in a row.

    Raises:
        OSError: naming ``path`` and the remedy if the disk is full or the folder cannot be written.
    """
    with disk_errors_naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if tidy:
            remove_leftovers(path.parent)
        part, held = _new_part(path)
        try:
            yield part
            if durable:
                _sync(part)
            os.replace(part, path)
            if durable and hasattr(os, "O_DIRECTORY"):  # also the folder's entry with the new name
                _sync(path.parent)
        except BaseException:
            with suppress(OSError):  # only the first error is reported
                part.unlink(missing_ok=True)
            raise
        finally:
            if held is not None:
                os.close(held)


def write_text(path: Path, text: str, durable: bool = False) -> None:
    r"""Write a text file by ``written_whole``, so that a reader never sees an incomplete file.

    The encoding is UTF-8; bytes in file names that are not UTF-8 are written as ``\udce9``, which JSON reads back.
    """
    with written_whole(path, durable) as part:
        part.write_text(text, encoding="utf-8", errors="backslashreplace")


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files of ``written_whole`` in ``folder`` whose process was killed, and no others."""
    if fcntl is None:
        return
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if _PART.fullmatch(entry.name):
                with suppress(OSError):  # its process still runs, it is a link, or another user's file
                    _remove_unheld(entry.path)


def open_lock(path: Path) -> int:
    """Open a lock file, created if missing, and return its descriptor; its content is not changed.

    Raises:
        ValueError: if it is a symbolic link.
        OSError: see ``written_whole``.
    """
    try:
        with disk_errors_naming(path):
            return os.open(path, os.O_RDWR | os.O_CREAT | _NOFOLLOW, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK) and path.is_symlink():
            raise ValueError(f"{path} is a symbolic link, which is not followed: remove it") from None
        raise


@contextmanager
def alone(lock: Path, refusal: str) -> Iterator[None]:
    """A context that holds the lock file ``lock``, which is removed at its end.

    The operating system releases the lock of a process that dies. Without file locks (Windows, some file systems) it
    does nothing.

    Args:
        lock: the lock file; it and its folder are created if missing.
        refusal: the message if another process holds the lock.

    Raises:
        ValueError: with ``refusal`` if another process holds the lock; also if ``lock`` is a symbolic link.
        OSError: if the folder cannot be written.
    """
    if fcntl is None:
        yield
        return
    while True:
        with disk_errors_naming(lock):
            lock.parent.mkdir(parents=True, exist_ok=True)
        held = open_lock(lock)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(held)
            raise ValueError(refusal) from None
        except OSError:  # a file system without locks: go on without
            break
        if os.fstat(held).st_nlink:
            break
        os.close(held)  # another process has just removed this file: try again with a new one
    _HELD.add(held)
    try:
        yield
    finally:
        if held in _HELD:  # not in a forked child, which has closed it
            _HELD.discard(held)
            with suppress(OSError):  # the folder may have been removed
                lock.unlink(missing_ok=True)
            os.close(held)


def _close_inherited_locks() -> None:
    """Close the locks in a forked child, such as a loader's worker: they end with the process that took them."""
    while _HELD:
        os.close(_HELD.pop())


_HELD: set[int] = set()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_inherited_locks)


@contextmanager
def disk_errors_naming(path: Path) -> Iterator[None]:
    """A context that turns errors about a full or read-only disk into ones that name ``path`` and the remedy."""
    try:
        yield
    except OSError as error:
        reason = _REASONS.get(error.errno or 0)
        named = error.filename is None or Path(os.fsdecode(error.filename)).parent in (
            path.parent,
            *path.parent.parents,
        )
        if reason is None or not named:
            raise
        told = type(error)(f"{str(path)!r} could not be written, {reason}")
        told.errno = error.errno
        raise told from error
    except RuntimeError as error:
        if "PytorchStreamWriter" not in str(error) and "inline_container" not in str(error):
            raise
        told = OSError(f"{str(path)!r} could not be written ({str(error).splitlines()[0]}): is the disk full?")
        raise told from error  # torch.save reports a full disk only so


def sentence_of(error: BaseException) -> str:
    """The message of an error; for a full or read-only disk, the path and the remedy."""
    if isinstance(error, OSError) and error.strerror and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        path = error.filename2 or error.filename
        return f"{'a file' if path is None else repr(os.fsdecode(path))} could not be written, {_REASONS[error.errno]}"
    return str(error)


def _new_part(path: Path) -> tuple[Path, int | None]:
    """Create a temporary file for ``path``; returns it, and a descriptor that locks it while this process lives."""
    while True:
        part = path.with_name(f".{path.name}.{uuid4().hex}.part")
        held = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | _NOFOLLOW, 0o666)
        if fcntl is None:  # Windows cannot rename an open file
            os.close(held)
            return part, None
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # another process is removing it as a leftover
            os.close(held)
            continue
        except OSError:  # a file system without locks, on which no process removes leftovers
            return part, held
        if os.fstat(held).st_nlink:
            return part, held
        os.close(held)


def _remove_unheld(path: str) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK | _NOFOLLOW)
    try:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(path)
    finally:
        os.close(descriptor)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
