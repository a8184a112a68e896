"""Which samples each batch holds, on each process: derived from (seed, epoch, pass), shared out over the ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.batch import Batch
from lightning_kd.core.seeding import numpy_generator
from lightning_kd.core.view_keys import ViewKeys

# a sample that comes again in a pass gets the views of another pass, so many further on
REPEAT = 1_000_000


class ShardedSampler:
    """Batches of sample indices for one process out of ``world_size``.

    With ``shuffle`` (training) the order is a permutation drawn from ``(seed, "shuffle", epoch, pass)``. Global batch
    ``k`` is the ``k``-th run of ``batch_size * world_size`` samples in it and rank ``r`` takes the ``r``-th part, so
    that the ranks together see the joint batches of one process with ``world_size`` times the batch size. The last,
    partial global batch is shared evenly (a few samples from the start of the order fill it up to a multiple of
    ``world_size``); it is dropped where it would leave a rank fewer than 2 samples, because BatchNorm cannot train on
    one, unless it is the only one. With ``drop_last`` it is always dropped, unless it is the only one. Every rank has
    the same number of batches of the same sizes.

    With ``classes`` each class comes equally often in that order, which stays as long as it is; where it cannot be
    divided, chance says which classes come once more. A class goes through a permutation of its samples, and begins
    another one where it has too few.

    Without ``shuffle`` (evaluation) the order is that of ``indices``, no sample comes twice over all ranks, every rank
    has the same number of batches, and the sizes of all batches differ by at most one. They are at most
    ``batch_size``, or one more where sharing out a batch size of 1 would leave a rank without a sample.

    Args:
        indices: int64 ``[n]``, the positions of the samples in the full array of their split.
        batch_size: samples a batch and process.
        shuffle: permute anew each epoch and pass.
        seed: the seed of the order.
        rank: this process.
        world_size: the number of processes.
        drop_last: with ``shuffle``, leave out a partial last batch.
        classes: with ``shuffle``, the class of each of ``indices``, ``[n]``; those that occur are balanced.

    Raises:
        ValueError: if ``indices`` is empty, ``batch_size`` is below 1, or an evaluation set has fewer samples than
            there are processes.
    """

    def __init__(
        self,
        indices: np.ndarray,
        batch_size: int,
        *,
        shuffle: bool,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
        classes: np.ndarray | None = None,
    ) -> None:
        self.indices = np.asarray(indices, dtype=np.int64)
        if len(self.indices) == 0:
            raise ValueError("indices is empty, got 0 samples: give at least one")
        check_numbers(least=1, whole=True, batch_size=batch_size)
        if not shuffle and len(self.indices) < world_size:
            raise ValueError(
                f"an evaluation set of {len(self.indices)} samples cannot be shared by world_size={world_size} "
                "processes: use fewer devices or a larger set"
            )
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.drop_last = drop_last
        self.classes = classes
        self.epoch = 0
        self._passes = 0

    @property
    def sampler(self) -> ShardedSampler:
        """Itself: Lightning looks for ``set_epoch`` on ``loader.batch_sampler.sampler``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass, and count passes from 0 again."""
        self.epoch = epoch
        self._passes = 0

    def next_pass(self) -> tuple[int, int, list[np.ndarray]]:
        """Start one more pass: ``(epoch, pass, batches)``; the pass grows by one each time until ``set_epoch``."""
        pass_ = self._passes
        self._passes += 1
        return self.epoch, pass_, self.batches(self.epoch, pass_)

    def batches(self, epoch: int, pass_: int = 0) -> list[np.ndarray]:
        """The batches of this rank in that epoch and pass, each int64 ``[b]``. Changes no state."""
        if not self.shuffle:
            return np.array_split(self.indices, len(self) * self.world_size)[self.rank :: self.world_size]
        return self._shared_out(self.indices[self._order(epoch, pass_)])

    def repeats(self, epoch: int, pass_: int = 0) -> list[np.ndarray] | None:
        """How often each sample of ``batches`` came before in the pass, on any rank; ``None`` where none comes twice.

        So that repeated samples can have views of their own.
        """
        if not self.shuffle or self.classes is None:
            return None
        order = self._order(epoch, pass_)
        by_sample = np.argsort(order, kind="stable")
        ordered = order[by_sample]
        before = np.empty_like(order)
        before[by_sample] = np.arange(len(order)) - np.searchsorted(ordered, ordered)
        return self._shared_out(before)

    def _order(self, epoch: int, pass_: int) -> np.ndarray:
        """Positions in ``indices``, in the order of the pass over all ranks."""
        generator, count = numpy_generator(self.seed, "shuffle", epoch, pass_), len(self.indices)
        if self.classes is None:
            return generator.permutation(count)
        names = np.unique(self.classes)
        share, rest = divmod(count, len(names))
        extra = set(generator.permutation(names)[:rest].tolist())
        drawn = []
        for name in names.tolist():
            own, wanted = np.flatnonzero(self.classes == name), share + (name in extra)
            rounds = [generator.permutation(own) for _ in range(-(-wanted // len(own)))]
            drawn += [each[: wanted - k * len(own)] for k, each in enumerate(rounds)]
        return generator.permutation(np.concatenate(drawn))

    def _shared_out(self, order: np.ndarray) -> list[np.ndarray]:
        """The part of this rank in values in the order of the pass."""
        full, share = self._full_and_share()
        step, start = self.batch_size * self.world_size, self.rank * self.batch_size
        batches = [order[k * step + start : k * step + start + self.batch_size] for k in range(full)]
        if share:
            last = np.resize(np.concatenate([order[full * step :], order]), share * self.world_size)
            batches.append(last[self.rank * share : (self.rank + 1) * share])
        return batches

    def _full_and_share(self) -> tuple[int, int]:
        """The number of full global batches, and each rank's share of the partial one (0: none, or dropped)."""
        full, rest = divmod(len(self.indices), self.batch_size * self.world_size)
        share = -(-rest // self.world_size)
        too_few = self.drop_last or share < 2 <= self.batch_size
        return full, 0 if full and too_few else share

    def __len__(self) -> int:
        """Batches a pass, the same on every rank."""
        if self.shuffle:
            full, share = self._full_and_share()
            return full + bool(share)
        count = len(self.indices)
        return min(-(-count // (self.batch_size * self.world_size)), count // self.world_size)

    def __iter__(self) -> Iterator[list[int]]:
        _, _, batches = self.next_pass()
        for batch in batches:
            yield batch.tolist()


def wide(rows: Tensor) -> Tensor:
    """Integers that are stored in 16 bits as int64, as all that a batch holds; others as they are."""
    return rows.long() if rows.dtype == torch.int16 else rows


class BatchLoader(ABC):
    """What the loaders of this package have in common: an iterable of ``Batch`` that Lightning leaves as it is.

    It is no ``torch.utils.data.DataLoader``, so Lightning puts no sampler of its own into it: ``sampler`` has already
    given each process its part. Lightning calls ``set_epoch`` on it at the start of every epoch.

    Args:
        sampler: the batches of this process.
    """

    def __init__(self, sampler: ShardedSampler) -> None:
        self.sampler = sampler

    @property
    def batch_sampler(self) -> ShardedSampler:
        """The same object as ``sampler``."""
        return self.sampler

    @property
    def batch_size(self) -> int:
        """Samples a batch and process."""
        return self.sampler.batch_size

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch by hand, in a loop without Lightning."""
        self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.sampler)

    def give_keys(self, keys: ViewKeys) -> None:
        """From now on let ``extras["view"]`` of each batch say which view each image is, int64 ``[B]``.

        Raises:
            ValueError: where views are not counted.
        """
        raise ValueError(f"{type(self).__name__} draws views that are not counted: take data that stays in memory")

    @property
    def key_count(self) -> int:
        """How many keys a sample has, once ``give_keys`` was called."""
        raise NotImplementedError

    def describe_keys(self) -> dict[str, Any]:
        """What the views behind the keys hang on, in plain values."""
        raise NotImplementedError

    def images(self, index: Tensor, key: Tensor) -> Tensor:
        """Samples in views of choice, as batches have them.

        Args:
            index: int64 ``[B]``, positions in the full array.
            key: int64 ``[B]``.
        """
        raise NotImplementedError

    def crops_of(self, index: Tensor) -> dict[str, Tensor]:
        """Where the view behind each key is in its image, for a store; empty where the key says it.

        Args:
            index: int64 ``[B]``, positions in the full array.

        Returns:
            ``box``, float32 ``[B * key_count, 4]``: top, left, height and width as shares of the upright image; and
            ``flip``, bool ``[B * key_count]``.
        """
        return {}

    @abstractmethod
    def __iter__(self) -> Iterator[Batch]:
        """One pass. Nothing may be drawn before the first batch: Lightning makes the iterator, then sets the epoch."""
