"""Reading and writing CSV files that may be opened in a spreadsheet. Imports neither numpy nor torch.

A spreadsheet takes a cell that begins with ``=``, ``+``, ``-``, ``@`` or a control character for a formula. A class or
file of such a name (never a number) is written with an apostrophe before it, which is removed when it is read.
"""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

__all__ = ["Table", "as_written", "column_name", "csv_text", "read_rows", "read_table", "without_zeros"]

_FORMULA = re.compile(r"'*[=+\-@\t\r\n]")
_NUMBER = r"(?:[+-]?(?:[\d.]+(?:e[+-]?\d+)?|inf|nan))?"
_NUMBERS = re.compile(f"{_NUMBER}(?:;{_NUMBER})*")  # a number, or a list of numbers


def csv_text(rows: Iterable[Sequence[Any]]) -> str:
    """The text of a CSV file, separated by commas.

    Args:
        rows: rows of numbers, texts and ``None`` for an empty cell. A text that a spreadsheet would take for a formula
            gets an apostrophe, which ``read_rows`` removes.
    """
    lines: list[str] = []
    # written with \r\n, so that cells with either character are quoted; then reduced to \n
    writer = csv.writer(SimpleNamespace(write=lines.append), lineterminator="\r\n")
    writer.writerows([_marked(cell) if isinstance(cell, str) else cell for cell in row] for row in rows)
    return "".join(f"{line[:-2]}\n" for line in lines)


def _marked(text: str) -> str:
    return f"'{text}" if _FORMULA.match(text) and not _NUMBERS.fullmatch(text) else text


def _unmarked(text: str) -> str:
    return text[1:] if text.startswith("'") and _FORMULA.match(text) else text


class Table(NamedTuple):
    """The content of a CSV file.

    Attributes:
        rows: line number and cells of each line.
        form: how the file's form differs from that of ``csv_text``, in words; mostly empty.
    """

    rows: list[tuple[int, list[str]]]
    form: list[str]


def read_rows(path: Path, argument: str = "") -> list[tuple[int, list[str]]]:
    """The ``rows`` of ``read_table``."""
    return read_table(path, argument).rows


def read_table(path: Path, argument: str = "") -> Table:
    """Read a CSV file, also one that a spreadsheet has written.

    Cells are separated by commas, semicolons or tabs, whichever the first line has most of, or as a first line
    ``sep=;`` says. The encoding is UTF-8, with or without a byte order mark, or UTF-16 with one. Spaces around cells,
    the apostrophes of ``csv_text`` and lines with empty cells only are removed. Messages call the file ``argument``.

    Raises:
        FileNotFoundError: if there is no such file.
        PermissionError: if it cannot be read.
        ValueError: if it is no CSV file.
    """
    named = f"{argument} {str(path)!r}".strip()
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{named} does not exist: give the path of a .csv file") from None
    except PermissionError:
        raise PermissionError(f"{named} may not be read: check the permissions of the file") from None
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
        stripped = ((reader.line_num, [cell.strip() for cell in row]) for row in reader)
        rows = [(line, [_unmarked(cell) for cell in row]) for line, row in stripped if any(row)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{named} is no .csv file in UTF-8 ({error}): save it as text in UTF-8") from error
    form = [f"cells separated by {'semicolons' if separator == ';' else 'tabs'}"] if separator in ";\t" else []
    form += ["UTF-16"] if wide else ["a byte order mark"] if content.startswith(codecs.BOM_UTF8) else []
    form += ["Windows line ends"] if "\r\n" in text else []
    return Table(rows[1:] if said else rows, form)


def column_name(cell: str) -> str:
    """The name of a column in the form in which it is compared: in lower case, spaces as underscores."""
    return "_".join(cell.lower().split())


def as_written(name: str) -> str:
    """A name as it is read from a file of ``csv_text`` and ``write_text``: without spaces around it, and with bytes
    that are not UTF-8 escaped."""
    return name.encode("utf-8", "backslashreplace").decode().strip()


def without_zeros(text: str) -> str:
    """``2`` for ``2.0``: programs write integers so in columns with empty cells."""
    return re.sub(r"(?<=\d)\.0+$", "", text)
