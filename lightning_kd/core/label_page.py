"""An HTML page on which a person labels images: one file with the pictures inside, which needs no server or network."""

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

MOST_PIXELS = 256  # largest height and width; larger pictures are reduced
SMALL = 64  # pictures of at most this height and width are stored without loss


class PageRow(NamedTuple):
    """One picture to label.

    Attributes:
        cells: the cells of its line in the saved CSV, before the label.
        picture: 8-bit grey or RGB, of any size.
        facts: names and texts shown beside it; the first one is its title.
        predicted: the name of the predicted class, by which a person can filter.
        given: the name of its present class, if it has one.
        otherwise: the name of the class that is saved if the person chooses none.
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

    The same arguments give the same text. The browser stores the choices under a digest of the text, so a page that is
    opened again still has them.

    Args:
        title: title of the page.
        rows: the pictures, in the order in which they are shown.
        columns: names of the columns of the CSV, the label's last.
        class_names: the classes to choose from.
        file_name: name of the CSV.
        command: the command that reads the CSV, shown on the page; ``RUN`` in it becomes the folder of the page.
        none: name of a further choice, for pictures of no class. Default: no such choice.
        keep_open: whether pictures without a choice have a line in the CSV, with an empty label.
        more: further lines of the CSV, independent of the choices.
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
    text = json.dumps(content, ensure_ascii=False).replace("<", "\\u003c")  # a name with </script> must not end it
    template = (Path(__file__).parent / "label_page.html").read_text(encoding="utf-8")
    return template.replace("__PAGE__", text, 1)


def write_page(path: Path, make: Callable[[], str]) -> None:
    """Write the page that ``make`` returns; if that fails, tell the user and go on."""
    try:
        write_text(path, make())
    except Exception as error:  # a run must not fail because of a page
        note(f"the page {path.name} could not be written ({error}); nothing else is affected")


def pictures_of(data: Any, indices: Sequence[int]) -> list[Image.Image]:
    """Small pictures of training samples of a data module, at positions ``indices`` in the full array.

    Raises:
        ValueError: if the samples are not images.
    """
    pictures = []
    for index in indices:
        picture = data.picture(index) if hasattr(data, "picture") else None
        if picture is None:
            raise ValueError(f"the samples of {type(data).__name__} are no images")
        pictures.append(_small(picture))  # reduced one by one: all originals may not fit into memory
    return pictures


def _cells(cells: Sequence[Any]) -> str:
    # as write_text writes them: a browser cannot handle bytes in names that are not UTF-8
    return csv_text([cells])[:-1].encode("utf-8", "backslashreplace").decode()


def picture_uri(picture: Image.Image, most: int = MOST_PIXELS) -> str:
    """A ``data:`` URI of ``picture``, 8-bit grey or RGB, reduced to at most ``most`` pixels in height and width."""
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
