"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

__all__ = ["write_text", "written_whole"]


@contextmanager
def written_whole(path: Path, durable: bool = False) -> Iterator[Path]:
    """A temporary path beside ``path`` to write to, which then takes its place; after an error nothing is left of it.

    Args:
        path: the file; folders above it are made.
        durable: wait until the disk has it, so that it survives a power cut too.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid4().hex}.part")
    try:
        yield part
        if durable:
            _sync(part)
        os.replace(part, path)
        if durable and hasattr(os, "O_DIRECTORY"):  # the new name, too
            _sync(path.parent)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str, durable: bool = False) -> None:
    """Write all or nothing: a reader never sees half a file."""
    with written_whole(path, durable) as part:
        part.write_text(text, encoding="utf-8")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
