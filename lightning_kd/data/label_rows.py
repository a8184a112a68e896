"""Finds the samples that the lines of a label table are for, by index or image path."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lightning_kd.core.notes import note
from lightning_kd.spreadsheet import as_written, without_zeros

__all__ = ["find_rows"]


def find_rows(columns: Mapping[str, np.ndarray], image: Any, source: str) -> tuple[np.ndarray, np.ndarray]:
    """The position of the sample of each line of a table, and whether the line is for a sample at all.

    Positions change when files are added or removed, so a line with a ``path`` is for the file of that name.

    Args:
        columns: string columns ``[n]``: ``index``, ``path`` or both. For image files ``path`` is enough, and then a
            name without its folders is accepted where only one file has it.
        image: the samples. Paths in a list are compared without the folder that all of them share, so the data set may
            have been moved; all lines are taken to share a folder too, where possible.
        source: name of the table, for messages.

    Returns:
        int64 ``[n]`` and bool ``[n]``, false where the file is not in ``image``; a printed note counts these.

    Raises:
        ValueError: for an ``index`` that is not a whole number, a name that several files have, or where no path
            matches.
    """
    numbered = "index" in columns
    try:
        given = columns["index"] if numbered else ["-1"] * len(columns["path"])
        place = np.array([*map(without_zeros, given)]).astype(np.int64)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"the column index of {source!r} must hold whole numbers ({error}): correct it") from None
    here = np.ones(len(place), dtype=bool)
    if not isinstance(image, list) or "path" not in columns:
        return place, here
    paths, files = columns["path"].tolist(), [as_written(path) for path in image]
    places = _find(paths, files)
    if not any(k is not None for k in places):  # the table may have been written on Windows
        paths = [path.replace("\\", "/") for path in paths]
        places = _find(paths, files)
    if not numbered and not any(k is not None for k in places):
        places = _find_names(paths, files, source)
    moved = []
    for k, (path, found) in enumerate(zip(paths, places, strict=True)):
        if not path:
            continue
        if found is None:  # the path may lack leading folders: then it must match the file at that index
            here[k] = 0 <= place[k] < len(image) and f"/{files[place[k]]}".endswith(f"/{path}")
        elif found != place[k]:
            moved += [path] if numbered else []
            place[k] = found
    gone = columns["path"][~here].tolist()
    if len(place) and not here.any():
        raise ValueError(
            f"no path in {source!r} is one of the training images, such as {gone[0]!r}: is it for this data set?"
            + (" To match the lines by index, remove the column path" if numbered else "")
        )
    if moved:
        note(f"{len(moved)} files of {source!r} have another index now, such as {moved[0]!r}: matched by their path")
    if gone:
        note(f"{len(gone)} files of {source!r} are not training images, such as {gone[0]!r}: left out")
    return place, here


def _find(paths: Sequence[str], files: Sequence[str]) -> list[int | None]:
    """The position in ``files`` of each path (else ``None``), compared without the folder that all files share."""
    shared = os.path.commonprefix(files).rfind(os.sep) + 1  # noqa: RUF071  # cut at a separator
    tails = {file[shared:]: k for k, file in enumerate(files)}
    found = [_by_folder(path, tails) for path in paths]
    own = files[0][:shared] if files else ""
    if not own or not any(path.startswith(own) for path in paths):
        counts = Counter(folder for each in found for folder in each)
        own = max(counts, key=lambda folder: (counts[folder], -len(folder)), default=os.sep)
    # a missing file must not match a file of the same name in a parent folder
    return [
        each.get(own) if path.startswith(own) else next(iter(each.values()), None)
        for path, each in zip(paths, found, strict=True)
    ]


def _find_names(paths: Sequence[str], files: Sequence[str], source: str) -> list[int | None]:
    """The position in ``files`` of each path (``None`` if not found), where paths may lack their leading folders."""
    named: dict[str, list[int]] = {}
    for k, file in enumerate(files):
        named.setdefault(os.path.basename(file), []).append(k)
    found: list[int | None] = []
    for path in paths:
        fits = [k for k in named.get(os.path.basename(path), ()) if f"/{files[k]}".endswith(f"/{path}")]
        if len(fits) > 1:
            raise ValueError(
                f"{path!r} in {source!r} may be {files[fits[0]]!r} or {files[fits[1]]!r}: put the folder before it"
            )
        found.append(fits[0] if fits else None)
    return found


def _by_folder(path: str, tails: Mapping[str, int]) -> dict[str, int]:
    """The positions of files that ``path`` may mean, by the leading folders that this leaves out, shortest first."""
    parts = path.split(os.sep)
    every = (os.sep.join(parts[k:]) for k in range(len(parts)))
    return {path[: len(path) - len(tail)]: tails[tail] for tail in every if tail in tails}
