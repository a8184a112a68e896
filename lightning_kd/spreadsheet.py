"""Tables of text as spreadsheets write them. Imports nothing, so that light commands can use it."""

from __future__ import annotations

import codecs
import csv
import io
from pathlib import Path

__all__ = ["column_name", "read_rows"]


def read_rows(path: Path) -> list[tuple[int, list[str]]]:
    """Line number and cells of each line that is not empty, without blanks around the cells.

    The cells are separated by commas, semicolons or tabs, whichever the first line has most of (or as a first line
    ``sep=;`` says). The text is UTF-8, with or without a mark at its beginning, or UTF-16 with one.

    Raises:
        FileNotFoundError, PermissionError: where there is no such file, or it may not be read.
        ValueError: where it is no such table.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{str(path)!r} does not exist: give the path of a .csv file") from None
    except PermissionError:
        raise PermissionError(f"{str(path)!r} may not be read: check the permissions of the file") from None
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if wide else "utf-8-sig")
        lines = text.splitlines(keepends=True)
        first = next((line for line in lines if line.strip()), "")
        separator = max(",;\t", key=lambda mark: len(next(csv.reader([first], delimiter=mark), [])))
        said = first.strip().lower().startswith("sep=") and len(first.strip()) == 5
        if said:
            separator = first.strip()[4]
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
        rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{str(path)!r} is no .csv file in UTF-8 ({error}): save it as text in UTF-8") from error
    return rows[1:] if said else rows


def column_name(cell: str) -> str:
    """The name of a column as it is compared: in lower case, blanks as underscores."""
    return "_".join(cell.lower().split())
