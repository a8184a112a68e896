"""Tables of text as spreadsheets read and write them. Imports nothing, so that light commands can use it.

A spreadsheet takes a cell that begins with ``=``, ``+``, ``-``, ``@`` or a control character for a formula, whoever
named a class or a file so. Such a text (never a number) is written with an apostrophe before it, and read without.
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
_NUMBERS = re.compile(f"{_NUMBER}(?:;{_NUMBER})*")  # a list of them too


def csv_text(rows: Iterable[Sequence[Any]]) -> str:
    """The rows as the text of a ``.csv``, separated by commas.

    Args:
        rows: of numbers, texts and ``None`` for an empty cell. Texts that a spreadsheet would take for a formula get
            an apostrophe, which ``read_rows`` takes away again.
    """
    lines: list[str] = []
    # the usual \r\n while it writes: so cells that hold either are quoted
    writer = csv.writer(SimpleNamespace(write=lines.append), lineterminator="\r\n")
    writer.writerows([_marked(cell) if isinstance(cell, str) else cell for cell in row] for row in rows)
    return "".join(f"{line[:-2]}\n" for line in lines)


def _marked(text: str) -> str:
    return f"'{text}" if _FORMULA.match(text) and not _NUMBERS.fullmatch(text) else text


def _unmarked(text: str) -> str:
    return text[1:] if text.startswith("'") and _FORMULA.match(text) else text


class Table(NamedTuple):
    """What ``read_table`` read.

    Attributes:
        rows: line number and cells of each line.
        form: in words, what is not as ``csv_text`` would have written it; mostly nothing.
    """

    rows: list[tuple[int, list[str]]]
    form: list[str]


def read_rows(path: Path) -> list[tuple[int, list[str]]]:
    """The ``rows`` of ``read_table``."""
    return read_table(path).rows


def read_table(path: Path) -> Table:
    """Line number and cells of each line that has more than empty cells, without blanks around the cells and
    ``csv_text``'s marks.

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
        stripped = ((reader.line_num, [cell.strip() for cell in row]) for row in reader)
        rows = [(line, [_unmarked(cell) for cell in row]) for line, row in stripped if any(row)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{str(path)!r} is no .csv file in UTF-8 ({error}): save it as text in UTF-8") from error
    form = [f"cells separated by {'semicolons' if separator == ';' else 'tabs'}"] if separator in ";\t" else []
    form += ["UTF-16"] if wide else ["a byte order mark"] if content.startswith(codecs.BOM_UTF8) else []
    form += ["Windows line ends"] if "\r\n" in text else []
    return Table(rows[1:] if said else rows, form)


def column_name(cell: str) -> str:
    """The name of a column as it is compared: in lower case, blanks as underscores."""
    return "_".join(cell.lower().split())


def as_written(name: str) -> str:
    """A name as it comes out of a file of ``csv_text`` and ``write_text``: without blanks around it, and bytes that are
    no UTF-8 written out."""
    return name.encode("utf-8", "backslashreplace").decode().strip()


def without_zeros(text: str) -> str:
    """``2`` for ``2.0``, as programs write whole numbers beside empty cells."""
    return re.sub(r"(?<=\d)\.0+$", "", text)
