"""A teacher's outputs for every view of the training images, in one file that many trainings can read.

``FILE`` holds the outputs, one row per view, followed by one byte per piece that marks it as finished. ``FILE.json``
describes the content.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_kd.core.view_keys import ViewKeys
from lightning_kd.distillation._store_header import (
    StoreLayout,
    first_difference,
    read_header,
    read_marks,
    teacher_argument,
)
from lightning_kd.distillation.soft_labels import SoftLabels, recover

__all__ = ["TeacherStore"]

# a store is copied to the GPU if it needs less than this share of the free memory
SHARE_OF_DEVICE = 0.5


class TeacherStore:
    """A finished store. Its file is memory-mapped: parts are read when they are needed and then stay in memory.

    Args:
        path: the file; ``PATH.json`` must be next to it.

    Raises:
        FileNotFoundError: if one of the two files is missing.
        ValueError: if the files are damaged or not finished.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.header = read_header(self.path)
        self.layout = StoreLayout(self.header)
        done = read_marks(self.path, self.layout)
        if missing := int((done == 0).sum()):
            raise ValueError(
                f"teacher_store {str(path)!r} is not finished, {missing} of {len(done)} pieces are missing: run the "
                "same lightning-kd teach command again to finish it"
            )
        self._position = torch.full((self.header["data"]["count"],), -1)
        self._position[torch.from_numpy(self.layout.samples)] = torch.arange(len(self.layout.samples))
        parts = {
            name: np.memmap(self.path, dtype, "c", start, (self.layout.rows, width))
            for name, (dtype, width, start) in self.layout.fields.items()
        }
        self._crops = {name: parts.pop(name) for name in ("box", "flip") if name in parts}
        self._parts = {name: torch.from_numpy(part) for name, part in parts.items()}

    def __deepcopy__(self, memo: dict[int, Any]) -> TeacherStore:
        return self  # averaged copies of a task share the store

    def __reduce__(self) -> tuple[type[TeacherStore], tuple[Path]]:
        return TeacherStore, (self.path,)

    @property
    def view_keys(self) -> ViewKeys:
        """The options with which a loader identifies its views."""
        views = self.header["views"]
        crops = self if "box" in self.layout.fields else None
        return ViewKeys(views.get("fixed"), views.get("seed") or 0, crops=crops)

    def crops_of(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The boxes and flips of all stored crops of an image, see ``StoredCrops``."""
        first = int(self._position[index]) * self.layout.keys
        rows = slice(first, first + self.layout.keys)
        return self._crops["box"][rows], self._crops["flip"][rows, 0]

    @property
    def reached(self) -> dict[str, float]:
        """The teacher's validation metrics by name; empty without a validation set."""
        return dict(self.header["reached"])

    def check(self, data: Any, teacher: Mapping[str, Any], indices: np.ndarray | None = None) -> None:
        """Raise an error if the store does not fit the data, the views, the teacher or the samples.

        Args:
            data: the data module of the training, set up.
            teacher: ``name``, ``weights``, ``mean``, ``std`` and ``size``, as given to a distillation. ``None``, a
                missing file and a network without a name are not compared.
            indices: samples that the training uses. Default: the training samples of ``data``.

        Raises:
            ValueError: with the first difference, or if samples are missing.
        """
        if not hasattr(data, "training_images"):
            raise ValueError(
                f"teacher_store {str(self.path)!r} is for a data module of this package whose batches tell their "
                f"views, got {type(data).__name__}: give that, or leave teacher_store out"
            )
        loader = data.loader("train", augment=True, view_keys=self.view_keys)
        here = {"data": data.training_images(), "views": loader.describe_keys()}
        stored = {name: self.header[name] for name in here}
        given = teacher_argument(teacher)
        stored["teacher"] = {key: self.header["teacher"][key] for key in given}
        what = first_difference(stored, {**here, "teacher": given})
        wanted = data.train_indices if indices is None else indices
        if what is None and (lacking := np.setdiff1d(wanted, self.layout.samples)).size:
            what = f"it lacks {lacking.size} of the {len(wanted)} training samples (another split or subset)"
        if what is not None:
            raise ValueError(
                f"teacher_store {str(self.path)!r} does not fit, {what}: train with what it was made of, or run "
                "lightning-kd teach for this config"
            )

    def to(self, device: torch.device) -> None:
        """Copy the outputs to a GPU if they are small enough; otherwise they stay in the file."""
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            if self.layout.size < SHARE_OF_DEVICE * free:
                self._parts = {name: part.to(device) for name, part in self._parts.items()}
                self._position = self._position.to(device)

    def logits(self, index: Tensor, key: Tensor) -> Tensor:
        """The teacher's logits of views, float32 ``[B, C]`` on the device of ``index``.

        For compressed outputs these are the logarithms of the probabilities times the temperature of the store, so that
        a softmax at that temperature gives the probabilities. The logarithm of 0 is replaced by that of the smallest
        positive float32 number.

        Args:
            index: int64 ``[B]``, positions in the full training array.
            key: int64 ``[B]``, the view of each sample, as in ``Batch.extras``.

        Raises:
            ValueError: if the store does not have a sample (checked on a CPU only).
        """
        found = self._rows(index, key)
        if "logits" in found:
            return found["logits"].float()
        logs = self._recovered(found).clamp(min=torch.finfo(torch.float32).tiny).log()
        return logs * float(self.header["temperature"])

    def probabilities(self, index: Tensor, key: Tensor, temperature: float = 1.0) -> Tensor:
        """The teacher's probabilities of views, float32 ``[B, C]``, see ``logits``.

        Args:
            index: see ``logits``.
            key: see ``logits``.
            temperature: temperature of the softmax for stored logits; compressed outputs keep that of the store.
        """
        found = self._rows(index, key)
        return (found["logits"].float() / temperature).softmax(1) if "logits" in found else self._recovered(found)

    def _recovered(self, found: Mapping[str, Tensor]) -> Tensor:
        stored = SoftLabels(found["index"].long(), found.get("probability"))
        return recover(stored, self.header["answers"], self.header["num_classes"])

    def _rows(self, index: Tensor, key: Tensor) -> dict[str, Tensor]:
        place = self._position.device
        position = self._position[index.to(place)]
        if place.type == "cpu" and len(position) and int(position.min()) < 0:
            raise ValueError(
                f"teacher_store {str(self.path)!r} has no answers for sample {int(index[position.argmin()])}: run "
                "lightning-kd teach for all samples that you train on"
            )
        rows = position * self.layout.keys + key.to(place)
        return {name: part.index_select(0, rows).to(index.device) for name, part in self._parts.items()}


def draws_of_teacher(path: str | Path) -> int:
    """How many random numbers were drawn to initialise the teacher of a store; 0 if unknown or without a store."""
    try:
        return int(read_header(Path(path).expanduser())["teacher"].get("draws") or 0)
    except (OSError, ValueError):  # reported at the start of a fit
        return 0
