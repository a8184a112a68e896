"""Writing predictions: as a table, or as a folder of masks with an overview picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lightning_kd.core.batch import Batch
from lightning_kd.core.distributed import gather_by_index, gather_columns, is_first_process
from lightning_kd.core.prediction_page import write_page
from lightning_kd.file_writing import remove_leftovers, write_text, written_whole
from lightning_kd.spreadsheet import csv_text

__all__ = ["MaskFolder", "PredictionTable", "PredictionWriter", "colours"]


class PredictionWriter(Protocol):
    """Writes the outputs of ``predict_step`` into a run folder."""

    def add(self, folder: Path, outputs: Mapping[str, Tensor], batch: Batch, data: Any) -> None:
        """Add the outputs of one batch of this process."""

    def finish(self, folder: Path, data: Any) -> None:
        """Finish writing after the last batch; all processes must call it."""


# the outputs of a process without batches
_NOTHING = {"index": torch.empty(0, dtype=torch.int64)}


class PredictionTable:
    """Writes ``predictions.csv``: ``index``, ``path`` if the samples are files, and the columns of the problem.

    If the samples are images, ``predictions.html`` shows the first 500 of them. Names that a spreadsheet would take for
    formulas have an apostrophe before them, see ``lightning_kd.spreadsheet``.

    Args:
        columns: a function from the outputs of all samples and the class names to a dict of columns.

    Attributes:
        sort: order of the rows: ``"index"``, or ``"confidence"``, the highest probability first.
    """

    sort = "index"

    def __init__(self, columns: Callable[[Mapping[str, Tensor], Sequence[str]], dict[str, list[Any]]]) -> None:
        self.columns = columns
        self._parts: list[dict[str, Tensor]] = []

    def add(self, folder: Path, outputs: Mapping[str, Tensor], batch: Batch, data: Any) -> None:
        self._parts.append({name: value.cpu() for name, value in outputs.items()})

    def finish(self, folder: Path, data: Any) -> None:
        parts = self._parts or [_NOTHING]
        outputs = gather_columns({name: torch.cat([part[name] for part in parts]) for name in parts[0]})
        index = outputs.pop("index")
        if len(index) and is_first_process():
            order = torch.arange(len(index))
            confidence = _confidence(outputs)
            if self.sort == "confidence":
                if confidence is None:
                    raise ValueError("sort must be 'index', got 'confidence': these predictions have no probabilities")
                order = confidence.argsort(descending=True, stable=True)
            index, outputs = index[order], {name: values[order] for name, values in outputs.items()}
            columns = self.columns(outputs, getattr(data, "class_names", None) or [])
            _write_table(folder, index.tolist(), columns, data)
            answers = next((columns[name] for name in ("class_name", "labels", "prediction") if name in columns), None)
            shares = None if confidence is None else confidence[order].tolist()
            write_page(folder, index.tolist(), answers or [""] * len(index), shares, data)


def _confidence(outputs: Mapping[str, Tensor]) -> Tensor | None:
    """The highest probability of each sample, ``[N]``."""
    probabilities = outputs.get("probabilities")
    return None if probabilities is None or probabilities.ndim != 2 else probabilities.amax(1)


class MaskFolder:
    """Writes predicted masks as ``predictions/INDEX.png`` (class ids as grey values), and two overviews.

    These are ``predictions.csv``, a table of the files, and ``predictions.png``, some images and masks in colour.

    Args:
        num_classes: number of classes, for the colours.
        shown: number of images in ``predictions.png``.
    """

    def __init__(self, num_classes: int, shown: int = 8) -> None:
        self.colours = colours(num_classes)
        self.shown = shown
        self._index: list[Tensor] = []
        self._pairs: list[tuple[np.ndarray | None, np.ndarray]] = []

    def add(self, folder: Path, outputs: Mapping[str, Tensor], batch: Batch, data: Any) -> None:
        target = folder / "predictions"
        if not self._index:
            remove_leftovers(target)
        masks = outputs["prediction"].cpu().numpy()
        for index, mask, image in zip(outputs["index"].tolist(), masks, batch.image, strict=True):
            with written_whole(target / _mask_name(index), tidy=False) as path:
                # PNG has grey values of 8 or 16 bits
                Image.fromarray(mask if mask.dtype == np.uint8 else mask.astype(np.uint16)).save(path, format="PNG")
            if len(self._pairs) < self.shown:
                self._pairs.append((_shown(image, data), self.colours[mask.astype(np.int64) % len(self.colours)]))
        self._index.append(outputs["index"].cpu())

    def finish(self, folder: Path, data: Any) -> None:
        (index,) = gather_by_index(torch.cat(self._index or list(_NOTHING.values())))
        if not len(index) or not is_first_process():
            return
        names = [_mask_name(i) for i in index.tolist()]
        for name in {path.name for path in (folder / "predictions").glob("*.png") if path.stem.isdecimal()} - set(
            names
        ):
            (folder / "predictions" / name).unlink()  # masks of an earlier prediction on more samples
        if self._pairs:
            with written_whole(folder / "predictions.png") as part:
                Image.fromarray(_page(self._pairs)).save(part, format="PNG")
        _write_table(folder, index.tolist(), {"mask": [f"predictions/{name}" for name in names]}, data)


def _mask_name(index: int) -> str:
    return f"{index:06d}.png"


def _page(pairs: Sequence[tuple[np.ndarray | None, np.ndarray]]) -> np.ndarray:
    """One picture of images next to their masks, two pairs in a row, uint8 ``[H, W, 3]``."""
    rows = [np.concatenate([part for part in pair if part is not None], 1) for pair in pairs]
    height = max(len(row) for row in rows)
    width = max(row.shape[1] for row in rows)
    page = np.full((height * -(-len(rows) // 2), 2 * width, 3), 255, dtype=np.uint8)
    for k, row in enumerate(rows):
        top, left = k // 2 * height, k % 2 * width
        page[top : top + len(row), left : left + row.shape[1]] = row
    return page


def colours(num_classes: int) -> np.ndarray:
    """A colour for each class, uint8 ``[C, 3]``: the colour map of Pascal VOC, whose class 0 is black."""
    classes = np.arange(num_classes)
    found = np.zeros((num_classes, 3), dtype=np.uint8)
    for bit in range(8):
        for channel in range(3):
            found[:, channel] |= ((classes >> channel & 1) << (7 - bit)).astype(np.uint8)
        classes = classes >> 3
    return found


def _shown(image: Tensor, data: Any) -> np.ndarray | None:
    """A normalised image as uint8 ``[H, W, 3]``; ``None`` if the normalisation is not known."""
    if not hasattr(data, "mean") or image.ndim != 3 or image.shape[0] not in (1, 3):
        return None
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (data.mean, data.std))
    pixels = (image.float().cpu() * std + mean).clamp(0, 1).mul(255).round().to(torch.uint8)
    return pixels.expand(3, -1, -1).permute(1, 2, 0).numpy()


def _write_table(folder: Path, index: list[int], columns: dict[str, list[Any]], data: Any) -> None:
    first: dict[str, list[Any]] = {"index": index}
    paths = [data.path_of(i) for i in index] if hasattr(data, "path_of") else [None]
    if None not in paths:
        first["path"] = paths
    rows = [
        [f"{value:.6g}" if isinstance(value, float) else value for value in row]
        for row in zip(*first.values(), *columns.values(), strict=True)
    ]
    write_text(folder / "predictions.csv", csv_text([[*first, *columns], *rows]))
