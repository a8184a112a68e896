"""The human annotations of CIFAR-10 (CIFAR-10N and CIFAR-10H) as labels by several annotators."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lightning_kd.argument_checks import check_numbers
from lightning_kd.data.array_files import read_arrays
from lightning_kd.data.cifar_n import CIFARN
from lightning_kd.data.crowd_labels import CrowdLabels, SimulatedCrowd, keep_some
from lightning_kd.data.label_noise import CleanLabels

__all__ = ["CIFAR10H", "CIFARNCrowd"]


class CIFARNCrowd(CrowdLabels):
    """The three human labels of each training image of CIFAR-10 (Wei et al., ICLR 2022, arXiv 2110.12088).

    The columns ``random1`` to ``random3`` are the three annotators. Each column mixes the labels of many people, whom
    the file does not identify.

    Args:
        path: as in ``CIFARN``.
        per_item: number of the three labels, chosen at random, that each image keeps.
        imbalance: see ``CrowdLabels``.
        seed: of that choice; 0 or more.

    Raises:
        ValueError: for an argument out of its range; when read, as in ``CIFARN``.
        FileNotFoundError: when read, where the file does not exist.
    """

    def __init__(self, path: str | None = None, per_item: int = 3, imbalance: float = 1.0, seed: int = 0) -> None:
        check_numbers(least=1, most=3, whole=True, per_item=per_item)
        self.path = path
        self.per_item = per_item
        super().__init__(imbalance, seed)
        CIFARN("random1", path)  # checks the path

    def draw(self, clean: CleanLabels, generator: np.random.Generator) -> np.ndarray:
        self._names = ["random1", "random2", "random3"]
        columns = [
            CIFARN(name, self.path).corrupt(clean.target, clean.class_names, clean.image, clean.file)  # type: ignore[arg-type]
            for name in self._names
        ]
        return keep_some(np.stack(columns, 1), self.per_item, generator)

    def without_files(self) -> CrowdLabels:
        return SimulatedCrowd(3, 0.82, self.per_item, self.imbalance, self.seed)


class CIFAR10H(CrowdLabels):
    """The labels of about 51 people for each test image of CIFAR-10 (Peterson et al., ICCV 2019).

    The file holds counts and does not say who gave which label: annotator ``r`` is the ``r``-th label drawn for an
    image. The training images must be the 10,000 test images of CIFAR-10 in their order, for example as an ``.npz``
    with ``image`` and ``target`` for ``ArrayDataModule``.

    Args:
        path: path of ``cifar10h-counts.npy``, integers ``[10000, 10]``.
        per_item: number of labels of each image, drawn without replacement.
        imbalance: see ``CrowdLabels``.
        seed: of the draw; 0 or more.

    Raises:
        ValueError: for an argument out of its range; when read, for a damaged file, or counts that do not match the
            data set.
        FileNotFoundError: when read, where the file does not exist.
    """

    def __init__(self, path: str, per_item: int = 3, imbalance: float = 1.0, seed: int = 0) -> None:
        check_numbers(least=1, whole=True, per_item=per_item)
        if Path(path).suffix != ".npy":
            raise ValueError(f"path must end in .npy, got {path!r}: give that of cifar10h-counts.npy")
        self.path = path
        self.per_item = per_item
        super().__init__(imbalance, seed)

    def draw(self, clean: CleanLabels, generator: np.random.Generator) -> np.ndarray:
        counts = read_arrays(Path(self.path)).get("", np.zeros(0))
        count = len(clean.target)
        if counts.shape != (count, clean.num_classes) or counts.dtype.kind not in "iu" or counts.min() < 0:
            raise ValueError(
                f"{self.path!r} must hold counts [{count}, {clean.num_classes}], one row for each image trained on, "
                f"got {counts.dtype} {list(counts.shape)}: they are for the test images of CIFAR-10"
            )
        agree = float((counts.argmax(1) == clean.target).mean())
        if agree < 0.9:
            raise ValueError(
                f"the majority of {self.path!r} agrees with the data set's label for {agree:.1%} of the images, and "
                "should for 99 %: give the test images of CIFAR-10 in their order"
            )
        item, label = (np.repeat(part.ravel(), counts.ravel()) for part in np.indices(counts.shape))
        order = np.lexsort((generator.random(len(item)), item))
        item, label = item[order], label[order]
        rank = np.arange(len(item)) - np.searchsorted(item, item)
        given = np.full((count, self.per_item), -1, dtype=np.int64)
        drawn = rank < self.per_item
        given[item[drawn], rank[drawn]] = label[drawn]
        return given

    def without_files(self) -> CrowdLabels:
        return SimulatedCrowd(self.per_item, 0.95, self.per_item, self.imbalance, self.seed)
