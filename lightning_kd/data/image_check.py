"""Checks that all image files of a data set can be read, before training starts."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image

from lightning_kd.core.distributed import together
from lightning_kd.data.image_files import upright, without_range
from lightning_kd.file_writing import write_text

__all__ = ["check_images", "damaged_images"]

# a progress bar is shown from this many files on
MANY = 2000


def check_images(
    paths: Sequence[str],
    root: str | Path,
    on_error: str,
    image_range: Sequence[float] | None = None,
    trainer: Any = None,
) -> set[str]:
    """The files among ``paths`` that cannot be read, after a warning. All processes of ``trainer`` must call it.

    Args:
        paths: the image files.
        root: the folder that holds them all; the results are cached per root.
        on_error: ``"raise"`` or ``"skip"``.
        image_range: see ``read_image``.
        trainer: its process 0 checks the files for all processes. Without one, each process checks them.

    Raises:
        ValueError: naming unreadable files, unless ``on_error`` is ``"skip"``.
    """
    if trainer is None:
        damaged = damaged_images(paths, root, image_range)
    else:
        damaged = {}
        with together(trainer.strategy.root_device):
            if trainer.is_global_zero:
                damaged = damaged_images(paths, root, image_range)
        damaged = trainer.strategy.broadcast(damaged)
    if not damaged:
        return set()
    some = "; ".join(f"{path} ({fault})" for path, fault in list(damaged.items())[:10])
    text = f"{len(damaged)} of {len(paths)} images cannot be read: {some}{'; ...' * (len(damaged) > 10)}"
    if on_error != "skip":
        raise ValueError(f"{text}: replace or remove them, or give on_error: skip")
    rank_zero_warn(f"left out, as {text}")
    return {*damaged}


def damaged_images(
    paths: Sequence[str], root: str | Path, image_range: Sequence[float] | None = None, show: bool = True
) -> dict[str, str]:
    """The files that ``read_image`` cannot read, and why.

    Of JPEG and PNG files only header and end are checked, others are decoded. Files that were checked before and still
    have the same size and modification time are not checked again: results are cached for each ``root`` in
    ``$XDG_CACHE_HOME/lightning_kd`` (default: ``~/.cache/lightning_kd``), if that folder is writable.

    Args:
        paths: the image files.
        root: the folder that holds them all.
        image_range: see ``read_image``.
        show: show a progress bar for many files.
    """
    whole = {path: os.path.abspath(path) for path in paths}
    cache = _cache_of(root)
    known = _read_cache(cache)
    stamps = {path: _stamp(path) for path in whole}
    fresh = [path for path in whole if stamps[path] is None or known.get(whole[path], [])[:2] != stamps[path]]
    with ThreadPoolExecutor(min(16, (os.cpu_count() or 1) * 4)) as pool:
        results = _with_bar(pool.map(_inspect, fresh), len(fresh), show)
    faults = {}
    for path, (fault, rangeless) in zip(fresh, results, strict=True):
        known.pop(whole[path], None)
        if fault:
            faults[path] = fault
        else:
            known[whole[path]] = [*(stamps[path] or ()), rangeless]
    if fresh:
        here = {*whole.values()}
        kept = {path: entry for path, entry in known.items() if path in here or os.path.exists(path)}
        with suppress(OSError):  # without a cache all files are checked again the next time
            write_text(cache, json.dumps(kept))
    for path in whole if image_range is None else ():
        if path not in faults and known[whole[path]][2]:
            faults[path] = known[whole[path]][2]
    return {path: faults[path] for path in whole if path in faults}


def _inspect(path: str) -> tuple[str, str]:
    """Why ``path`` cannot be read, and why it needs an ``image_range``; each is empty if it is not so."""
    try:
        with Image.open(path) as image:
            rangeless = without_range(image)
            if not _has_end(path, str(image.format)):
                upright(image)
    except Exception as error:
        return str(error) or type(error).__name__, ""
    return "", rangeless


def _has_end(path: str, kind: str) -> bool:
    """Whether a JPEG or PNG file ends with its end marker. False also where other bytes follow the marker."""
    if kind not in ("JPEG", "MPO", "PNG"):
        return False
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - 4096))
        tail = file.read()
    return tail[-8:-4] == b"IEND" if kind == "PNG" else tail.rstrip(b"\0")[-2:] == b"\xff\xd9"


def _with_bar(results: Any, count: int, show: bool) -> list[tuple[str, str]]:
    if count < MANY or not show:
        return list(results)
    from rich.progress import track

    return list(track(results, "checking the images", total=count, transient=True))


def _stamp(path: str) -> list[int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return [found.st_mtime_ns, found.st_size]


def _cache_of(root: str | Path) -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    name = hashlib.sha256(os.path.abspath(root).encode("utf-8", "surrogateescape")).hexdigest()[:24]
    return Path(base) / "lightning_kd" / f"images_below_{name}.json"


def _read_cache(path: Path) -> dict[str, list[Any]]:
    """The cached entries by file: modification time, size, and why it needs an ``image_range``; others are dropped."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    entries = found.items() if isinstance(found, dict) else ()
    return {
        path: entry
        for path, entry in entries
        if isinstance(entry, list) and len(entry) == 3 and isinstance(entry[2], str)
    }
