"""What is in the two files of a teacher store, and whether two of them are of the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from lightning_kd.distillation.soft_labels import kept_classes

__all__ = [
    "FORMAT",
    "StoreLayout",
    "file_digest",
    "first_difference",
    "header_path",
    "ranges_of",
    "read_header",
    "read_marks",
    "teacher_argument",
    "weights_digests",
]

FORMAT = 2


class StoreLayout:
    """Where what is in a store's file.

    Args:
        header: what ``FILE.json`` holds: ``answers`` (``"logits"`` or a kind of soft label), ``dtype``,
            ``num_classes``, ``samples`` (ranges of positions in the full training array), ``keys`` (views of each) and
            ``piece`` (samples that are written at once).

    Attributes:
        fields: dtype, numbers a row and first byte of each part of the answers, by name.
        samples: int64 ``[P]``, the samples in it, ascending.
        pieces: how many pieces there are.
        marks: the first of the bytes that say which of them are done.
        size: of the file in bytes.
    """

    def __init__(self, header: Mapping[str, Any]) -> None:
        self.keys: int = header["keys"]
        self.piece: int = header["piece"]
        self.samples = np.concatenate([np.arange(*pair) for pair in header["samples"]])
        kind, classes = header["answers"], header["num_classes"]
        if kind == "logits":
            parts = {"logits": (np.dtype(header["dtype"]), classes)}
        else:
            kept = kept_classes(kind, classes)
            # whole numbers: half precision has none above 2048
            parts = {"index": (np.dtype(np.int16 if classes < 2**15 else np.int32), kept)}
            if kind != "hard":
                parts["probability"] = (np.dtype(header["dtype"]), kept)
        if header["views"].get("crops"):
            parts |= {"box": (np.dtype(np.float32), 4), "flip": (np.dtype(np.bool_), 1)}
        self.fields: dict[str, tuple[np.dtype[Any], int, int]] = {}
        self.size = 0
        for name, (dtype, width) in parts.items():
            self.fields[name] = (dtype, width, self.size)
            self.size += -(-self.rows * width * dtype.itemsize // 64) * 64
        self.pieces = -(-len(self.samples) // self.piece)
        self.marks = self.size
        self.size += self.pieces

    @property
    def rows(self) -> int:
        """Rows of each part: ``keys`` for each sample, one sample after the other."""
        return len(self.samples) * self.keys

    def samples_of(self, piece: int) -> slice:
        """Which of ``samples`` a piece is of."""
        return slice(piece * self.piece, min((piece + 1) * self.piece, len(self.samples)))


def header_path(path: Path) -> Path:
    """The file beside a store that says what it is of."""
    return path.with_name(path.name + ".json")


def read_header(path: Path) -> dict[str, Any]:
    """What ``FILE.json`` says.

    Raises:
        FileNotFoundError: where there is none.
        ValueError: where it is damaged, or of another version.
    """
    file = header_path(path)
    if not file.is_file():
        raise FileNotFoundError(
            f"teacher_store {str(path)!r}: there is no {file}; make the store by lightning-kd teach, or name another"
        )
    try:
        header = json.loads(file.read_text(encoding="utf-8"))
        if header["format"] == FORMAT:
            StoreLayout(header)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error}): put back a copy, or make the store anew") from None
    if header["format"] != FORMAT:
        raise ValueError(f"{file} is of format {header['format']}, this version reads {FORMAT}: make the store anew")
    return dict(header)


def read_marks(path: Path, layout: StoreLayout) -> np.ndarray:
    """The byte of each piece, 1 where it is done.

    Raises:
        ValueError: where the file has another size.
    """
    size = path.stat().st_size if path.is_file() else 0
    if size == 0:
        return np.zeros(layout.pieces, np.uint8)
    if size != layout.size:
        raise ValueError(f"{path} is damaged, it has {size} bytes of {layout.size}: put back a copy, or make it anew")
    return np.fromfile(path, np.uint8, layout.pieces, offset=layout.marks)


def ranges_of(indices: np.ndarray) -> list[list[int]]:
    """Ascending numbers as ranges ``[[first, last + 1], ...]``."""
    ends = np.flatnonzero(np.diff(indices) != 1)
    first, last = np.append(0, ends + 1), np.append(ends, len(indices) - 1)
    return [[int(indices[a]), int(indices[b]) + 1] for a, b in zip(first, last, strict=True)]


def file_digest(path: str | Path) -> str:
    """The sha256 of a file."""
    found = hashlib.sha256()
    with Path(path).expanduser().open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def weights_digests(weights: Any) -> Any:
    """The sha256 of a teacher's file of weights, or of each of a list; what names no file stays as it is.

    Raises:
        OSError: where a file cannot be read.
    """
    if isinstance(weights, list | tuple):
        return [weights_digests(one) for one in weights]
    return weights if weights in (None, "default", "random") else file_digest(weights)


def teacher_argument(teacher: Mapping[str, Any]) -> dict[str, Any]:
    """What of a distillation's arguments about its teacher can be compared, as ``FILE.json`` has it.

    Args:
        teacher: ``name``, ``weights``, ``mean``, ``std`` and ``size``, of several teachers a list of each. What is
            ``None``, and weights of which a file is missing, are left out.
    """
    given = {key: value for key, value in teacher.items() if value is not None and key != "weights"}
    weights = teacher.get("weights")
    if weights in ("default", "random"):
        given["weights"] = weights
    elif weights is not None:
        with suppress(OSError):
            given["weights_sha256"] = weights_digests(weights)
    return dict(json.loads(json.dumps(given)))


def first_difference(stored: Any, here: Any, name: str = "") -> str | None:
    """Where two descriptions differ, in words; ``None`` where they do not."""
    if isinstance(stored, Mapping) and isinstance(here, Mapping):
        for key in {**stored, **here}:
            inner = f"{name}.{key}" if name else str(key)
            if (found := first_difference(stored.get(key), here.get(key), inner)) is not None:
                return found
        return None
    stored, here = (json.loads(json.dumps(value)) for value in (stored, here))
    if stored == here:
        return None
    if name.endswith("sha256"):
        return "the weights are others" if name.startswith("teacher") else "the images are others"
    if isinstance(stored, list) and isinstance(here, list) and len(stored) == len(here) > 4:
        k = next(k for k, pair in enumerate(zip(stored, here, strict=True)) if pair[0] != pair[1])
        return f"{name}[{k}] was {stored[k]!r}, here it is {here[k]!r}"
    return f"{name} was {stored!r}, here it is {here!r}"
