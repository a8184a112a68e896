"""Which views of its training samples a loader is to give, where it tells which one each image is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.seeding import numpy_generator

__all__ = ["VIEW", "StoredCrops", "ViewKeys"]

#: what ``Batch.extras`` calls the key of each image's view, int64 ``[B]``
VIEW = "view"

# rows of the table that are drawn at once
_ROWS = 4096


class StoredCrops(Protocol):
    """Where in its image each stored crop is."""

    def of(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Top, left, height and width as shares of the upright image, float32 ``[K, 4]``, and flips, bool ``[K]``."""


@dataclass(frozen=True)
class ViewKeys:
    """All views that a sample can have, or some of them that are drawn once and for all.

    With all of them the keys are those of ``CropFlip``, and training sees what it would see without keys. With
    ``fixed`` they are 0 to ``fixed - 1``, one as likely as another, and training sees fewer different images.

    Args:
        fixed: so many different views of each sample. Default: all there are.
        seed: of their draw.
        per_visit: how many different views of a sample stand beside each other in a batch, which has so many times
            its samples then, and their indices and targets as often.
        crops: of image files, the views behind the keys, where they were stored.

    Raises:
        ValueError: for a number that is none.
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
        """The keys of a visit, int64 ``[B, per_visit]``, different ones of each sample.

        They hang on the sample alone, not on its batch or process.

        Args:
            index: int64 ``[B]``, positions in the full array.
            key_count: keys of a sample.
            seed: of the order and the views of the loader.
            epoch: of the pass.
            pass_: of the epoch; ``[B]`` where a sample that comes again in it is to have other keys.

        Raises:
            ValueError: where a sample has fewer keys.
        """
        if self.per_visit > key_count:
            raise ValueError(f"per_visit must be {key_count} or fewer, the views of a sample, got {self.per_visit}")
        drawn = [
            numpy_generator(seed, "visits", epoch, p, i).choice(key_count, self.per_visit, replace=False)
            for p, i in zip(np.broadcast_to(pass_, index.shape).tolist(), index.tolist(), strict=True)
        ]
        return np.stack(drawn).astype(np.int64)

    def table(self, samples: int, views: int) -> np.ndarray | None:
        """The view behind each key, int64 ``[samples, fixed]``; ``None`` where keys are views.

        Args:
            samples: of the full array.
            views: how many a sample has.

        Raises:
            ValueError: where there are fewer than ``fixed``.
        """
        if self.fixed is None:
            return None
        if self.fixed > views:
            raise ValueError(
                f"fixed views must be {views} or fewer, which a sample has, got {self.fixed}: ask for less"
            )
        generator = numpy_generator(self.seed, "fixed_views")
        parts = [
            generator.permuted(np.tile(np.arange(views), (min(_ROWS, samples - start), 1)), axis=1)[:, : self.fixed]
            for start in range(0, samples, _ROWS)
        ]
        return np.concatenate(parts)
