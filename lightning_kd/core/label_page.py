"""A page to label on: one file that works without a server or a network, with the pictures inside."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from lightning_kd.core.notes import note
from lightning_kd.file_writing import write_text
from lightning_kd.spreadsheet import csv_text

__all__ = ["PageRow", "label_page", "picture_uri", "pictures_of", "write_page"]

MOST_PIXELS = 256  # of a side
SMALL = 64  # pictures up to this are kept to the pixel


class PageRow(NamedTuple):
    """One picture to label.

    Attributes:
        cells: of its line in the saved CSV, before the label.
        picture: 8-bit grey or RGB, of any size.
        facts: names and texts shown beside it; the first one stands for it.
        predicted: the name of the predicted class, by which a person can filter.
        given: the name of the class it has now, where it has one.
        otherwise: the name of the class that is saved where nobody chooses one.
    """

    cells: Sequence[Any]
    picture: Image.Image
    facts: Sequence[tuple[str, str]]
    predicted: str
    given: str | None = None
    otherwise: str | None = None


def label_page(
    title: str,
    rows: Sequence[PageRow],
    columns: Sequence[str],
    class_names: Sequence[str],
    *,
    file_name: str,
    command: str,
    none: str | None = None,
    keep_open: bool = True,
    more: Sequence[Sequence[Any]] = (),
) -> str:
    """The text of an HTML page on which a person gives each picture a class and saves a CSV.

    The same arguments give the same text; what is chosen is kept by the browser under a digest of it.

    Args:
        title: of the page.
        rows: in the order in which they are looked at.
        columns: of the CSV, the last one that of the label.
        class_names: to choose from.
        file_name: of the CSV.
        command: what to do with it, in which ``RUN`` becomes the folder that the page is in.
        none: a further choice, for what is none of the classes.
        keep_open: whether the CSV has lines for what nobody chose anything for, with an empty label.
        more: further lines of the CSV, whatever is chosen.
    """
    choices: list[dict[str, Any]] = [{"name": name, "cell": _cells([name])} for name in class_names]
    if none is not None:
        choices.append({"name": none, "cell": _cells([none]), "none": True})
    content: dict[str, Any] = {
        "title": title,
        "header": _cells(columns),
        "file_name": file_name,
        "command": command,
        "keep_open": keep_open,
        "choices": choices,
        "more": [_cells(cells) for cells in more],
        "rows": [
            {
                "cells": _cells(row.cells),
                "picture": picture_uri(row.picture),
                "facts": list(row.facts),
                "predicted": row.predicted,
                "given": row.given,
                "otherwise": None if row.otherwise is None else _cells([row.otherwise]),
            }
            for row in rows
        ],
    }
    content["key"] = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    text = json.dumps(content, ensure_ascii=False).replace("<", "\\u003c")  # no name ends the script
    template = (Path(__file__).parent / "label_page.html").read_text(encoding="utf-8")
    return template.replace("__PAGE__", text, 1)


def write_page(path: Path, make: Callable[[], str]) -> None:
    """Write the page that ``make`` gives; where that is not possible say so and go on, whatever the reason."""
    try:
        write_text(path, make())
    except Exception as error:  # a page must not cost a training
        note(f"no {path.name} to label on ({error}); all else is unharmed")


def pictures_of(data: Any, indices: Sequence[int]) -> list[Image.Image]:
    """Small pictures of the training samples of a data module at ``indices`` of the full array, for a person.

    Raises:
        ValueError: where they are no images.
    """
    pictures = []
    for index in indices:
        picture = data.picture(index) if hasattr(data, "picture") else None
        if picture is None:
            raise ValueError(f"the samples of {type(data).__name__} are no images")
        pictures.append(_small(picture))  # one by one: all at once may not fit into memory
    return pictures


def _cells(cells: Sequence[Any]) -> str:
    # as a file of ``write_text`` has them: bytes in names that are no UTF-8 would not get through the browser
    return csv_text([cells])[:-1].encode("utf-8", "backslashreplace").decode()


def picture_uri(picture: Image.Image, most: int = MOST_PIXELS) -> str:
    """A ``data:`` URI of ``picture``, 8-bit grey or RGB, made smaller where a side has more than ``most`` pixels."""
    picture = _small(picture, most)
    kind, options = ("png", {}) if max(picture.size) <= SMALL else ("jpeg", {"quality": 85})
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def _small(picture: Image.Image, most: int = MOST_PIXELS) -> Image.Image:
    if max(picture.size) > most:
        picture = picture.copy()
        picture.thumbnail((most, most))
    return picture
