"""Files that are there whole or not at all, and what is said where they cannot be written."""

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
except ImportError:  # there is no such thing on Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["alone", "open_lock", "remove_leftovers", "sentence_of", "told_of", "write_text", "written_whole"]

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
    """A temporary file beside ``path`` to write to, which then takes its place; after an error nothing is left of it.

    Args:
        path: the file; folders above it are made.
        durable: wait until the disk has it, so that it survives a power cut too.
        tidy: first remove what processes that were killed have left there; turned off where many files follow.

    Raises:
        OSError: naming ``path`` and what to do, where the disk is full or the folder may not be written.
    """
    with told_of(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if tidy:
            remove_leftovers(path.parent)
        part, held = _new_part(path)
        try:
            yield part
            if durable:
                _sync(part)
            os.replace(part, path)
            if durable and hasattr(os, "O_DIRECTORY"):  # the new name, too
                _sync(path.parent)
        except BaseException:
            with suppress(OSError):  # the first error is the one to tell
                part.unlink(missing_ok=True)
            raise
        finally:
            if held is not None:
                os.close(held)


def write_text(path: Path, text: str, durable: bool = False) -> None:
    r"""Write all or nothing: a reader never sees half a file.

    The text is UTF-8; bytes in the names of files that are none are written as ``\udce9``, which JSON reads back.
    """
    with written_whole(path, durable) as part:
        part.write_text(text, encoding="utf-8", errors="backslashreplace")


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of ``written_whole`` in ``folder`` whose process was killed; others are left alone."""
    if fcntl is None:
        return
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if _PART.fullmatch(entry.name):
                with suppress(OSError):  # of a process that lives, a link, or somebody else's
                    _remove_unheld(entry.path)


def open_lock(path: Path) -> int:
    """The descriptor of a file to lock, made where it is missing; what it holds is never touched.

    Raises:
        ValueError: where it is a symbolic link.
        OSError: as ``written_whole``.
    """
    try:
        with told_of(path):
            return os.open(path, os.O_RDWR | os.O_CREAT | _NOFOLLOW, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK) and path.is_symlink():
            raise ValueError(f"{path} is a symbolic link, which is not followed: remove it") from None
        raise


@contextmanager
def alone(lock: Path, refusal: str) -> Iterator[None]:
    """Hold the file ``lock``, which is removed at the end; a process that dies lets go of it.

    Args:
        lock: made where it is missing, and its folder.
        refusal: what is said where another process holds it.

    Raises:
        ValueError: ``refusal``, and where ``lock`` is a symbolic link.
        OSError: where the folder may not be written.
    """
    if fcntl is None:
        yield
        return
    while True:
        with told_of(lock):
            lock.parent.mkdir(parents=True, exist_ok=True)
        held = open_lock(lock)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(held)
            raise ValueError(refusal) from None
        except OSError:  # a file system without locks: better alone by luck than not at all
            break
        if os.fstat(held).st_nlink:
            break
        os.close(held)  # the process that held it has just removed it
    _HELD.add(held)
    try:
        yield
    finally:
        if held in _HELD:  # else this is a child, which has let go
            _HELD.discard(held)
            with suppress(OSError):  # the folder may be gone
                lock.unlink(missing_ok=True)
            os.close(held)


def _let_go() -> None:
    """In a child, such as a worker of a loader: a lock must not outlive the process that took it."""
    while _HELD:
        os.close(_HELD.pop())


_HELD: set[int] = set()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


@contextmanager
def told_of(path: Path) -> Iterator[None]:
    """Say of errors inside, where the disk is full or nothing may be written, that ``path`` is not, and what to do."""
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
        raise told from error  # all that torch.save says of a full disk


def sentence_of(error: BaseException) -> str:
    """What an error says; of a full or read-only disk, whoever was writing there, the path and what to do."""
    if isinstance(error, OSError) and error.strerror and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        path = error.filename2 or error.filename
        return f"{'a file' if path is None else repr(os.fsdecode(path))} could not be written, {_REASONS[error.errno]}"
    return str(error)


def _new_part(path: Path) -> tuple[Path, int | None]:
    """A new file, no link, and a descriptor that holds it as long as this process lives."""
    while True:
        part = path.with_name(f".{path.name}.{uuid4().hex}.part")
        held = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | _NOFOLLOW, 0o666)
        if fcntl is None:  # Windows moves no file that is open
            os.close(held)
            return part, None
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # somebody takes it for a leftover just now
            os.close(held)
            continue
        except OSError:  # a file system without locks: nobody can take it for one
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
