"""Which views of its training samples a loader is to give, where it tells which one each image is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.seeding import numpy_generator

__all__ = ["VIEW", "ViewKeys"]

#: what ``Batch.extras`` calls the key of each image's view, int64 ``[B]``
VIEW = "view"

# rows of the table that are drawn at once
_ROWS = 4096


@dataclass(frozen=True)
class ViewKeys:
    """All views that a sample can have, or some of them that are drawn once and for all.

    With all of them the keys are those of ``CropFlip``, and training sees what it would see without keys. With
    ``fixed`` they are 0 to ``fixed - 1``, one as likely as another, and training sees fewer different images.

    Args:
        fixed: so many different views of each sample. Default: all there are.
        seed: of their draw.

    Raises:
        ValueError: for a number that is none.
    """

    fixed: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_numbers(least=1, whole=True, optional=True, fixed=self.fixed)
        check_numbers(least=0, whole=True, seed=self.seed)

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
