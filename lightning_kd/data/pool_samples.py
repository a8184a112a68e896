"""The samples of a pool: those of a labelled data set, followed by those of an unlabelled folder or array."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from lightning_kd.data.classification_data import ClassificationDataModule
from lightning_kd.data.image_check import check_images
from lightning_kd.data.image_files import images_below
from lightning_kd.data.new_samples import read_unlabelled


class PoolSamples(NamedTuple):
    """The samples of a source, followed by unlabelled ones.

    Attributes:
        image: all samples, a tensor or a list of paths.
        own_count: number of samples of the source; the others are from ``path``.
        path: the folder or array file of the unlabelled samples; ``None`` where all samples are the source's.
    """

    image: Any
    own_count: int
    path: str | None = None

    @property
    def has_files(self) -> bool:
        """Whether the unlabelled samples are a folder of images, identified by their paths."""
        return self.path is not None and isinstance(self.image, list)

    def path_of(self, index: int) -> str | None:
        """The image file of a sample, relative to the pool's folder if it is in there; ``None`` for arrays."""
        if not isinstance(self.image, list):
            return None
        if self.has_files and index >= self.own_count:
            return str(self.image[index])[len(str(Path(str(self.path)))) :].lstrip(os.sep)
        return str(self.image[index])


def add_unlabelled(source: ClassificationDataModule, path: str, fake: bool) -> PoolSamples:
    """The training samples of ``source``, followed by those of the folder or array file ``path``.

    Raises:
        ValueError: where ``path`` holds no sample, samples of another shape or dtype, or files that are labelled
            samples.
    """
    image, own_count = source.train_image, len(source.train_target)
    if fake:  # synthetic test samples stand in for unlabelled ones
        return PoolSamples(torch.cat([image, source.test_image]), own_count, path)
    if isinstance(image, list):
        return PoolSamples([*image, *_unlabelled_files(source, path)], own_count, path)
    pool = read_unlabelled(path, "pool")
    if pool.shape[1:] != image.shape[1:] or pool.dtype != image.dtype:
        raise ValueError(
            f"samples of pool {path!r} must be like those of the source {tuple(image.shape[1:])}, got "
            f"{tuple(pool.shape[1:])}: give both in one shape and dtype"
        )
    return PoolSamples(torch.cat([image, pool]), own_count, path)


def readable(samples: PoolSamples, universe: np.ndarray, source: Any, trainer: Any) -> np.ndarray:
    """The positions ``universe``, int64 ``[n]``, without those of damaged image files.

    Raises:
        ValueError: naming damaged files, unless the source's ``on_error`` is ``"skip"``.
    """
    if not samples.has_files or not hasattr(source, "on_error"):
        return universe
    added = samples.image[samples.own_count :]
    damaged = check_images(added, str(samples.path), source.on_error, source.image_range, trainer)
    return np.array([i for i in universe if samples.image[i] not in damaged], dtype=np.int64)


def _unlabelled_files(source: ClassificationDataModule, path: str) -> list[str]:
    paths = images_below(Path(path), argument="pool")
    if not paths:
        raise ValueError(f"pool {path!r} holds no image: give the folder of the unlabelled images")
    val = source.val_image if source._val_source == "val" else []
    twice = {os.path.realpath(p) for p in paths} & {
        os.path.realpath(p) for p in [*source.train_image, *source.test_image, *val]
    }
    if twice:
        raise ValueError(
            f"pool {path!r} holds images that are labelled samples of source, such as {min(twice)!r}: keep the pool "
            "outside of the class folders"
        )
    return paths
