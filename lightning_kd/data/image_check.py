"""Looking at all image files of a data set before they are used."""

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

# from this many files on a progress bar is shown
MANY = 2000


def check_images(
    paths: Sequence[str],
    root: str | Path,
    on_error: str,
    image_range: Sequence[float] | None = None,
    trainer: Any = None,
) -> set[str]:
    """The files among ``paths`` that cannot be used, after a warning; collective over the processes of ``trainer``.

    Args:
        paths: the files.
        root: the folder that holds them all.
        on_error: ``"raise"`` or ``"skip"``.
        image_range: see ``read_image``.
        trainer: whose process 0 looks at them for all; without one, each process does.

    Raises:
        ValueError: naming them, unless ``on_error`` is ``"skip"``.
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
    """The files that ``read_image`` could not read, and why.

    JPEG and PNG files get a quick look at head and tail, others are decoded. What was looked at before, and has still
    its size and time, is not looked at again: that is kept for each ``root`` in the user's cache folder
    (``$XDG_CACHE_HOME/lightning_kd``, mostly ``~/.cache``), where that can be written.

    Args:
        paths: the files.
        root: the folder that holds them all.
        image_range: see ``read_image``.
        show: a progress bar, where there are many.
    """
    whole = {path: os.path.abspath(path) for path in paths}
    cache = _cache_of(root)
    known = _read_cache(cache)
    stamps = {path: _stamp(path) for path in whole}
    fresh = [path for path in whole if stamps[path] is None or known.get(whole[path], [])[:2] != stamps[path]]
    with ThreadPoolExecutor(min(16, (os.cpu_count() or 1) * 4)) as pool:
        looks = _with_bar(pool.map(_look, fresh), len(fresh), show)
    faults = {}
    for path, (fault, rangeless) in zip(fresh, looks, strict=True):
        known.pop(whole[path], None)
        if fault:
            faults[path] = fault
        else:
            known[whole[path]] = [*(stamps[path] or ()), rangeless]
    if fresh:
        here = {*whole.values()}
        kept = {path: entry for path, entry in known.items() if path in here or os.path.exists(path)}
        with suppress(OSError):  # then all are looked at the next time
            write_text(cache, json.dumps(kept))
    for path in whole if image_range is None else ():
        if path not in faults and known[whole[path]][2]:
            faults[path] = known[whole[path]][2]
    return {path: faults[path] for path in whole if path in faults}


def _look(path: str) -> tuple[str, str]:
    """Why ``path`` is no whole image, empty where it is one; and of one, what it needs an ``image_range`` for."""
    try:
        with Image.open(path) as image:
            rangeless = without_range(image)
            if not _has_end(path, str(image.format)):
                upright(image)
    except Exception as error:
        return str(error) or type(error).__name__, ""
    return "", rangeless


def _has_end(path: str, kind: str) -> bool:
    """Whether a JPEG or PNG file has its end; not where it is cut off, or has something behind it."""
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

    return list(track(results, "looking at the images", total=count, transient=True))


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
    """By file its time, its size, and what it needs an ``image_range`` for; without what is not so."""
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
