"""The layout of the two files of a teacher store, and the comparison of two stores."""

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
# what the header says of each of several teachers
_OF_EACH = ("name", "weights", "mean", "std", "size", "weights_sha256")


class StoreLayout:
    """The positions of all parts in the file of a store.

    Args:
        header: content of ``FILE.json``: ``answers`` (``"logits"`` or a kind of soft label), ``dtype``,
            ``num_classes``, ``samples`` (ranges of positions in the full training array), ``keys`` (views per sample)
            and ``piece`` (samples that are written at once).

    Attributes:
        fields: dtype, values per row and first byte of each part, by name.
        samples: int64 ``[P]``, the stored samples, ascending.
        pieces: number of pieces.
        marks: position of the bytes that mark finished pieces, one per piece.
        size: size of the file in bytes.
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
            # class indices are integers: float16 cannot represent all above 2048
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
        """Number of rows of each part: ``keys`` rows per sample, sample after sample."""
        return len(self.samples) * self.keys

    def samples_of(self, piece: int) -> slice:
        """The slice of ``samples`` that belongs to a piece."""
        return slice(piece * self.piece, min((piece + 1) * self.piece, len(self.samples)))


def header_path(path: Path) -> Path:
    """The JSON file next to a store that describes its content."""
    return path.with_name(path.name + ".json")


def read_header(path: Path) -> dict[str, Any]:
    """Read ``FILE.json``.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if the file is damaged or has another format version.
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
    teacher = header["teacher"]
    if isinstance(teacher.get("name"), list) and len(teacher["name"]) == 1:  # as older versions described a list of one
        alone = {key: value[0] for key, value in teacher.items() if isinstance(value, list) and key in _OF_EACH}
        header["teacher"] = {**teacher, **alone}
    return dict(header)


def read_marks(path: Path, layout: StoreLayout) -> np.ndarray:
    """The mark of each piece, uint8, 1 if it is finished.

    Raises:
        ValueError: if the file has another size than expected.
    """
    size = path.stat().st_size if path.is_file() else 0
    if size == 0:
        return np.zeros(layout.pieces, np.uint8)
    if size != layout.size:
        raise ValueError(f"{path} is damaged, it has {size} bytes of {layout.size}: put back a copy, or make it anew")
    return np.fromfile(path, np.uint8, layout.pieces, offset=layout.marks)


def ranges_of(indices: np.ndarray) -> list[list[int]]:
    """Ascending integers as ranges ``[[first, last + 1], ...]``."""
    ends = np.flatnonzero(np.diff(indices) != 1)
    first, last = np.append(0, ends + 1), np.append(ends, len(indices) - 1)
    return [[int(indices[a]), int(indices[b]) + 1] for a, b in zip(first, last, strict=True)]


def file_digest(path: str | Path) -> str:
    """The SHA-256 of a file."""
    found = hashlib.sha256()
    with Path(path).expanduser().open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def weights_digests(weights: Any) -> Any:
    """The SHA-256 of a weights file, or of each file in a list.

    ``None``, ``"default"`` and ``"random"`` are returned as they are.

    Raises:
        OSError: where a file cannot be read.
    """
    if isinstance(weights, list | tuple):
        return [weights_digests(one) for one in weights]
    return weights if weights in (None, "default", "random") else file_digest(weights)


def teacher_argument(teacher: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a distillation about its teacher in the form of ``FILE.json``, to compare them with a store.

    Args:
        teacher: ``name``, ``weights``, ``mean``, ``std`` and ``size``, each a list for several teachers. Arguments that
            are ``None``, and weights whose file is missing, are left out.
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
    """The first difference between two descriptions, in words; ``None`` if they are equal."""
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
        return "the weights differ" if name.startswith("teacher") else "the images differ"
    if isinstance(stored, list) and isinstance(here, list) and len(stored) == len(here) > 4:
        k = next(k for k, pair in enumerate(zip(stored, here, strict=True)) if pair[0] != pair[1])
        return f"{name}[{k}] was {stored[k]!r}, here it is {here[k]!r}"
    return f"{name} was {stored!r}, here it is {here!r}"
