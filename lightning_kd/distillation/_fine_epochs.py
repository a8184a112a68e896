"""One loader for most of a training and another for its last epochs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, islice, repeat
from typing import Any

from lightning_kd.core.batch import Batch

__all__ = ["FineEpochs"]


class FineEpochs:
    """A loader that uses another loader in its last epochs.

    A fine epoch repeats passes over ``fine`` until it has as many batches as a pass over ``coarse``, because the
    Trainer reads the length of an epoch only once. Lightning calls ``set_epoch`` through ``sampler``.

    Args:
        coarse: the loader of most epochs.
        fine: the loader of the last epochs.
        is_fine: function from the number of an epoch to whether it is one of the last.
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
        # a generator reads the epoch at the first batch: Lightning makes the iterator, then sets the epoch
        if self.is_fine(self.epoch):  # each repetition is a new pass with another order and other views
            yield from islice(chain.from_iterable(repeat(self.fine)), len(self))
        else:
            yield from self.coarse
