"""One loader for most of a training and another for its last epochs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, islice, repeat
from typing import Any

from lightning_kd.core.batch import Batch

__all__ = ["FineEpochs"]


class FineEpochs:
    """A loader whose last epochs are passes over another one, one after the other, of as many batches in all.

    Every epoch has the same length, which a Trainer looks at once. Lightning finds ``set_epoch`` through ``sampler``.

    Args:
        coarse: of most epochs.
        fine: of the last ones.
        is_fine: whether an epoch is one of these.
    """

    def __init__(self, coarse: Any, fine: Any, is_fine: Callable[[int], bool]) -> None:
        self.coarse, self.fine, self.is_fine = coarse, fine, is_fine
        self.epoch = 0

    @property
    def sampler(self) -> FineEpochs:
        return self

    @property
    def batch_sampler(self) -> FineEpochs:
        return self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        for loader in (self.coarse, self.fine):
            loader.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.coarse)

    def __iter__(self) -> Iterator[Batch]:
        # nothing before the first batch: Lightning makes the iterator, then sets the epoch
        if self.is_fine(self.epoch):  # each turn is a new pass, of another order and other views
            yield from islice(chain.from_iterable(repeat(self.fine)), len(self))
        else:
            yield from self.coarse
