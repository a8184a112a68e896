"""Keys of the augmented views of training samples, for loaders that say which view of a sample each image is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.seeding import numpy_generator

__all__ = ["VIEW", "StoredCrops", "ViewKeys"]

#: name in ``Batch.extras`` of the key of each image's view, int64 ``[B]``
VIEW = "view"

# rows of the table that are drawn in one call
_ROWS = 4096


class StoredCrops(Protocol):
    """The positions of stored crops in their images."""

    def crops_of(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The crops of sample ``index``: top, left, height and width as shares of the upright image, float32
        ``[K, 4]``, and whether each is flipped, bool ``[K]``."""


@dataclass(frozen=True)
class ViewKeys:
    """The views of a sample that a loader may give: all, or a fixed number of them.

    A view is one crop and flip of an image, and its key is an integer. With all views, the keys are those of
    ``CropFlip`` and training sees the same images as without keys. With ``fixed``, the keys are 0 to ``fixed - 1``,
    equally likely, and training sees fewer different images.

    Args:
        fixed: number of different views of each sample, drawn once. Default: all views.
        seed: seed of that draw.
        per_visit: number of different views of a sample that are next to each other in a batch. The batch then has so
            many rows for each sample, with the same index and target.
        crops: for image files, the stored crops that the keys stand for. Default: none are stored.

    Raises:
        ValueError: for a number out of range.
    """

    fixed: int | None = None
    seed: int = 0
    per_visit: int = 1
    crops: StoredCrops | None = None

    def __post_init__(self) -> None:
        check_numbers(least=1, whole=True, optional=True, fixed=self.fixed)
        check_numbers(least=0, whole=True, seed=self.seed)
        check_numbers(least=1, whole=True, per_visit=self.per_visit)

    def visits(self, index: np.ndarray, key_count: int, seed: int, epoch: int, pass_: int | np.ndarray) -> np.ndarray:
        """The keys of the views in a batch, int64 ``[B, per_visit]``, all different within a sample.

        They depend on the sample, epoch and pass, not on its batch or process.

        Args:
            index: int64 ``[B]``, positions in the full array.
            key_count: number of keys of a sample.
            seed: seed of order and views of the loader.
            epoch: number of the epoch.
            pass_: number of the pass within the epoch, or ``[B]``, one for each sample.

        Raises:
            ValueError: if a sample has fewer than ``per_visit`` keys.
        """
        if self.per_visit > key_count:
            raise ValueError(
                f"per_visit must be {key_count} or fewer, the views of a sample, got {self.per_visit}: give fewer"
            )
        drawn = [
            numpy_generator(seed, "visits", epoch, p, i).choice(key_count, self.per_visit, replace=False)
            for p, i in zip(np.broadcast_to(pass_, index.shape).tolist(), index.tolist(), strict=True)
        ]
        return np.stack(drawn).astype(np.int64)

    def table(self, samples: int, views: int) -> np.ndarray | None:
        """The view of each key, int64 ``[samples, fixed]``; ``None`` if all views are given, whose keys are the views.

        Args:
            samples: number of samples in the full array.
            views: number of views of a sample.

        Raises:
            ValueError: if there are fewer than ``fixed`` views.
        """
        if self.fixed is None:
            return None
        if self.fixed > views:
            raise ValueError(f"fixed must be {views} or fewer, the views of a sample, got {self.fixed}: give fewer")
        generator = numpy_generator(self.seed, "fixed_views")
        parts = [
            generator.permuted(np.tile(np.arange(views), (min(_ROWS, samples - start), 1)), axis=1)[:, : self.fixed]
            for start in range(0, samples, _ROWS)
        ]
        return np.concatenate(parts)
