"""Synthetic multi-label images: mosaics of single-label images, to measure multi-label methods without a download."""

from __future__ import annotations

import copy
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.problems import MultiLabel
from lightning_kd.core.seeding import numpy_generator
from lightning_kd.data.array_files import Arrays
from lightning_kd.data.cifar import CIFAR100_CLASSES, CIFAR100_COARSE, CIFAR100_COARSE_CLASSES
from lightning_kd.data.classification_data import ClassificationDataModule
from lightning_kd.data.multi_label_data import MultiLabelDataModule
from lightning_kd.data.weak_labels import CandidateLabels, SinglePositive

__all__ = ["MosaicDataModule"]


class MosaicDataModule(MultiLabelDataModule):
    """Mosaics of ``grid`` x ``grid`` images of another data set, whose labels are the classes of all tiles.

    For each mosaic the class of one tile is drawn first, the classes of the others by their co-occurrence with it, then
    an image of each class (with replacement), then the positions. Training, validation and test mosaics are made of the
    training, validation and test images in use by ``source``, so no image is in two of them. They are drawn once,
    depend only on ``mosaic_seed``, and stay in memory. Crop, flip, cutout, ``mean`` and ``std`` of ``source`` apply to
    the mosaics. See ``MultiLabelDataModule`` for attributes, loaders and use with several processes.

    Args:
        source: images in memory with one class each and no label noise.
        grid: tiles per row and per column, 1 or more.
        classes: ``"fine"`` for the classes of ``source``, ``"coarse"`` for the 20 superclasses of CIFAR-100.
        co_occurrence: ``[C, C]``, numbers from 0 on. If the first tile has class ``i``, the probability of class ``j``
            in the others is proportional to its frequency times entry ``[i, j]``. Default: 1 everywhere.
        imbalance: ratio of the frequencies of the first and the last class, 1 or more; those in between form a
            geometric series.
        train_mosaics: number of training mosaics. Default: so many that each image is used once on average.
        val_mosaics: number of validation mosaics, with the same default; none where ``source`` has no validation
            images.
        test_mosaics: number of test mosaics, with the same default.
        mosaic_seed: of the mosaics; 0 or more.
        batch_size: training mosaics per step and process.
        eval_batch_size: largest number of mosaics per evaluation step and process.
        train_fraction: fraction of the training mosaics to train on, in (0, 1]. Default: all.
        seed: fixes the training subset; together with ``seed_everything`` also the order of the batches and the
            augmentation.
        fake: let ``source`` use its synthetic data set.
        candidates: see ``MultiLabelDataModule``.
        single_positive: see ``MultiLabelDataModule``.
        labelled_fraction: see ``MultiLabelDataModule``.
        labelled_seed: see ``MultiLabelDataModule``.
        normalize: see ``MultiLabelDataModule``.
        n_grid: see ``MultiLabelDataModule``.

    Raises:
        ValueError: for an argument out of its range, or a source that is not single-label images in memory.
    """

    def __init__(
        self,
        source: ClassificationDataModule,
        grid: int = 2,
        classes: Literal["fine", "coarse"] = "fine",
        co_occurrence: list[list[float]] | None = None,
        imbalance: float = 1.0,
        train_mosaics: int | None = None,
        val_mosaics: int | None = None,
        test_mosaics: int | None = None,
        mosaic_seed: int = 0,
        batch_size: int = 64,
        eval_batch_size: int = 256,
        train_fraction: float | None = None,
        seed: int = 0,
        fake: bool = False,
        candidates: CandidateLabels | None = None,
        single_positive: SinglePositive | None = None,
        labelled_fraction: float | None = None,
        labelled_seed: int = 1,
        normalize: bool = True,
        n_grid: int = 2,
    ) -> None:
        check_numbers(least=1, whole=True, grid=grid)
        check_numbers(least=1, imbalance=imbalance)
        check_numbers(least=0, whole=True, mosaic_seed=mosaic_seed)
        counts = {"train_mosaics": train_mosaics, "val_mosaics": val_mosaics, "test_mosaics": test_mosaics}
        check_numbers(counts, least=1, whole=True, optional=True)
        if source.candidates is not None or source.meta_per_class is not None:
            raise ValueError(
                f"source may have no candidates and no meta set, got candidates={source.candidates} and "
                f"meta_per_class={source.meta_per_class}: leave them out, and give candidates to the mosaics"
            )
        if not source.problem.one_class or len(source.input_shape) != 3 or source.noise is not None:
            raise ValueError(
                f"source must be images with one class each and no noise, got {source} with {source.problem.kind}, "
                f"samples of {source.input_shape} and noise={source.noise}: give such data"
            )
        annotations = getattr(source, "annotations", None)
        if annotations is not None:
            raise ValueError(f"source must have no annotations, got {annotations}: leave them out")
        names, self._class_of = _classes_of(source, classes)
        super().__init__(
            class_names=names,
            input_shape=(source.input_shape[0], *(grid * side for side in source.input_shape[1:])),
            mean=source.mean,
            std=source.std,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            val_fraction=0.0,
            train_fraction=train_fraction,
            crop_flip=source.crop_flip,
            cutout=source.cutout,
            seed=seed,
            fake=fake,
            problem=MultiLabel(len(names)),
            candidates=candidates,
            single_positive=single_positive,
            labelled_fraction=labelled_fraction,
            labelled_seed=labelled_seed,
            normalize=normalize,
            n_grid=n_grid,
        )
        self.source = copy.copy(source)
        self.source._stored = {}
        if fake:
            self.source.fake = True
        self.grid = grid
        self.classes = classes
        self.co_occurrence = co_occurrence
        self.imbalance = imbalance
        self._beside = _check_co_occurrence(co_occurrence, names)
        self.train_mosaics = train_mosaics
        self.val_mosaics = val_mosaics
        self.test_mosaics = test_mosaics
        self.mosaic_seed = mosaic_seed

    def prepare_data(self) -> None:
        self.source.prepare_data()

    def fake_arrays(self) -> Arrays:
        return self.load_arrays()

    def load_arrays(self) -> Arrays:
        source = self.source
        source.setup()
        if not isinstance(source.train_image, Tensor):
            raise ValueError(f"source must be images in memory, got {source}: give arrays instead of files")
        train, test = self._mosaics("train"), self._mosaics("test")
        return Arrays(*train, *test, *(self._mosaics("val") if len(source.val_indices) else ()))

    def _mosaics(self, split: str) -> tuple[Tensor, Tensor]:
        """The mosaics of a split, uint8 ``[M, C, grid * H, grid * W]``, and their labels, float32 ``[M, K]``."""
        source = self.source
        array = source._val_source if split == "val" else split
        image, indices = getattr(source, f"{array}_image"), getattr(source, f"{split}_indices")
        tiles = self.grid**2
        count = getattr(self, f"{split}_mosaics") or max(1, len(indices) // tiles)
        of_class = self._class_of[getattr(source, f"{array}_target").numpy()[indices]]
        frequency = self.imbalance ** -np.linspace(0, 1, self.num_classes)
        there = np.bincount(of_class, minlength=self.num_classes)
        chosen = _draw_tiles(
            count, tiles, there, frequency, self._beside, numpy_generator(self.mosaic_seed, f"mosaics_{split}")
        )
        classes, place = chosen
        order = indices[np.argsort(of_class, kind="stable")]
        rows = order[(np.cumsum(there) - there)[classes] + place]
        target = torch.zeros(count, self.num_classes)
        target.scatter_(1, torch.from_numpy(classes), 1.0)
        channels, height, width = image.shape[1:]
        tiled = image[torch.from_numpy(rows.reshape(-1))].view(count, self.grid, self.grid, channels, height, width)
        return tiled.permute(0, 3, 1, 4, 2, 5).reshape(count, *self.input_shape).contiguous(), target


def _classes_of(source: ClassificationDataModule, classes: str) -> tuple[list[str], np.ndarray]:
    """The class names of mosaics, and the class index in them of each class of ``source``, int64."""
    if classes not in ("fine", "coarse"):
        raise ValueError(f"classes must be 'fine' or 'coarse', got {classes!r}: choose one")
    same = np.arange(source.num_classes)
    if classes == "fine" or source.class_names == CIFAR100_COARSE_CLASSES:
        return source.class_names, same
    if source.class_names != CIFAR100_CLASSES:
        raise ValueError(
            f"classes='coarse' is for CIFAR-100, got {type(source).__name__} of {source.num_classes} classes: give "
            "'fine', or such data"
        )
    return CIFAR100_COARSE_CLASSES, np.array(CIFAR100_COARSE)


def _check_co_occurrence(given: list[list[float]] | None, names: list[str]) -> np.ndarray:
    size = len(names)
    if given is None:
        return np.ones((size, size))
    try:
        table = np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(
            f"co_occurrence must be a table of numbers, got {given!r:.80}: give rows of one length"
        ) from None
    if table.shape != (size, size) or not np.isfinite(table).all() or (table < 0).any():
        raise ValueError(
            f"co_occurrence must be {size} rows of {size} numbers from 0 on, one for each class, got shape "
            f"{table.shape}, from {table.min() if table.size else None} on: correct it"
        )
    if (empty := table.sum(1) == 0).any():
        raise ValueError(
            f"co_occurrence must have a number above 0 in each row, got only zeros for "
            f"{names[int(empty.argmax())]!r}: correct its row"
        )
    return table


def _draw_tiles(
    count: int,
    tiles: int,
    there: np.ndarray,
    frequency: np.ndarray,
    beside: np.ndarray,
    generator: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw the class of each tile, and which image of that class it shows, both int64 ``[count, tiles]``.

    Args:
        count: number of mosaics.
        tiles: number of tiles of each.
        there: int64 ``[C]``, number of images of each class; classes without images are not drawn.
        frequency: ``[C]``, relative frequency of the classes of first tiles.
        beside: ``[C, C]``, see ``co_occurrence``.
        generator: source of the random numbers.

    Raises:
        ValueError: where only classes without images may stand beside a class.
    """
    frequency = np.where(there > 0, frequency, 0)
    weight = beside * frequency
    alone = (weight.sum(1) == 0) & (frequency > 0)
    if tiles > 1 and alone.any():
        raise ValueError(
            f"co_occurrence allows beside class {int(alone.argmax())} only classes without images: give its row "
            "another number above 0"
        )
    uniform = generator.random((count, tiles))
    classes = np.empty((count, tiles), dtype=np.int64)
    classes[:, 0] = _draw_index(frequency, uniform[:, 0])
    for c in np.unique(classes[:, 0]) if tiles > 1 else ():
        rows = classes[:, 0] == c
        classes[rows, 1:] = _draw_index(weight[c], uniform[rows, 1:])
    classes = generator.permuted(classes, axis=1)
    return classes, np.floor(generator.random((count, tiles)) * there[classes]).astype(np.int64)


def _draw_index(weight: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """Indices drawn with probabilities proportional to ``weight``, from uniform numbers in [0, 1)."""
    cumulative = weight.cumsum()
    # with side="left", a uniform number 0.0 could draw an index of weight 0
    return (cumulative / cumulative[-1]).searchsorted(uniform, side="right")
