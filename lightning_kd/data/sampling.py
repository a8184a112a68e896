"""Chooses the samples of each batch on each process, from (seed, epoch, pass), and the base class of loaders."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.batch import Batch
from lightning_kd.core.seeding import numpy_generator
from lightning_kd.core.view_keys import ViewKeys

# the n-th repetition of a sample within pass p gets the views of pass p + n * REPEAT
REPEAT = 1_000_000


class ShardedSampler:
    """Batches of sample positions for one of ``world_size`` processes.

    With ``shuffle`` (training) the order is a permutation drawn from ``(seed, "shuffle", epoch, pass)``. Global batch
    ``k`` is the ``k``-th run of ``batch_size * world_size`` samples in it, and rank ``r`` takes the ``r``-th part, so
    together the ranks see the batches of one process with ``world_size`` times the batch size. The last, partial global
    batch is divided evenly (a few samples from the start of the order fill it up to a multiple of ``world_size``). It
    is dropped where a rank would get a single sample, on which BatchNorm cannot train; with ``drop_last`` it is always
    dropped; but never where it is the only one. Every rank has the same number of batches of the same sizes.

    With ``classes`` each class is equally frequent in an order of the same length; if the length cannot be divided
    evenly, random classes get one sample more. A class draws from a permutation of its samples, and starts another one
    when that is used up.

    Without ``shuffle`` (evaluation) the order is that of ``indices``, no sample is repeated over all ranks, every rank
    has the same number of batches, and the sizes of all batches differ by at most one. They are at most ``batch_size``,
    or one more where dividing with a batch size of 1 would leave a rank without a sample.

    Args:
        indices: int64 ``[n]``, positions of the samples in the full array of their split.
        batch_size: samples per batch and process.
        shuffle: draw a new order for each epoch and pass.
        seed: seed of the order.
        rank: rank of this process.
        world_size: number of processes.
        drop_last: with ``shuffle``, leave out a partial last batch.
        classes: with ``shuffle``, the class of each of ``indices``, ``[n]``; the classes that occur are balanced.

    Raises:
        ValueError: where ``indices`` is empty, ``batch_size`` is below 1, or an evaluation set has fewer samples than
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
        """The sampler itself, because Lightning calls ``set_epoch`` on ``loader.batch_sampler.sampler``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next pass, and restart counting passes from 0."""
        self.epoch = epoch
        self._passes = 0

    def next_pass(self) -> tuple[int, int, list[np.ndarray]]:
        """Begin a pass: ``(epoch, pass, batches)``; the number of the pass grows by 1 per call until ``set_epoch``."""
        pass_ = self._passes
        self._passes += 1
        return self.epoch, pass_, self.batches(self.epoch, pass_)

    def batches(self, epoch: int, pass_: int = 0) -> list[np.ndarray]:
        """The batches of this rank in an epoch and pass, each int64 ``[b]``. Changes no state."""
        if not self.shuffle:
            return np.array_split(self.indices, len(self) * self.world_size)[self.rank :: self.world_size]
        return self._shared_out(self.indices[self._order(epoch, pass_)])

    def repeats(self, epoch: int, pass_: int = 0) -> list[np.ndarray] | None:
        """How often each sample of ``batches`` occurred before in the pass, on any rank; ``None`` without repeats.

        With it each repetition of a sample gets another random view.
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
        """Positions in ``indices`` in the order of the pass, over all ranks."""
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
        """This rank's part of values that are in the order of the pass, cut into batches."""
        full, share = self._full_and_share()
        step, start = self.batch_size * self.world_size, self.rank * self.batch_size
        batches = [order[k * step + start : k * step + start + self.batch_size] for k in range(full)]
        if share:
            last = np.resize(np.concatenate([order[full * step :], order]), share * self.world_size)
            batches.append(last[self.rank * share : (self.rank + 1) * share])
        return batches

    def _full_and_share(self) -> tuple[int, int]:
        """Number of full global batches, and samples per rank of the partial one (0: none, or dropped)."""
        full, rest = divmod(len(self.indices), self.batch_size * self.world_size)
        share = -(-rest // self.world_size)
        too_few = self.drop_last or share < 2 <= self.batch_size
        return full, 0 if full and too_few else share

    def __len__(self) -> int:
        """Number of batches per pass, the same on every rank."""
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
    """Tensors stored as int16 as int64, which batches hold; others unchanged."""
    return rows.long() if rows.dtype == torch.int16 else rows


class BatchLoader(ABC):
    """The base class of the loaders of this package: an iterable of ``Batch`` that Lightning does not change.

    It is not a ``torch.utils.data.DataLoader``, so Lightning does not replace its sampler, which has already divided
    the samples between the processes. Lightning calls ``set_epoch`` on it at the start of every epoch.

    Args:
        sampler: chooses the samples of each batch of this process.
    """

    def __init__(self, sampler: ShardedSampler) -> None:
        self.sampler = sampler

    @property
    def batch_sampler(self) -> ShardedSampler:
        """The sampler; Lightning looks for it under this name."""
        return self.sampler

    @property
    def batch_size(self) -> int:
        """Samples per batch and process."""
        return self.sampler.batch_size

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, for a training loop without Lightning."""
        self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.sampler)

    def give_keys(self, keys: ViewKeys) -> None:
        """From now on, ``extras["view"]`` of each batch holds the key of each image's view, int64 ``[B]``.

        Raises:
            ValueError: where the views of this loader have no keys.
        """
        raise ValueError(f"{type(self).__name__} draws views without keys: use data that stays in memory")

    @property
    def key_count(self) -> int:
        """Number of keys of a sample, after a call of ``give_keys``."""
        raise NotImplementedError

    def describe_keys(self) -> dict[str, Any]:
        """Everything that the views behind the keys depend on, as plain values."""
        raise NotImplementedError

    def images(self, index: Tensor, key: Tensor) -> Tensor:
        """Chosen views of samples, prepared as in batches.

        Args:
            index: int64 ``[B]``, positions in the full array.
            key: int64 ``[B]``, the key of the view of each.
        """
        raise NotImplementedError

    def images_of(self, batches: Sequence[tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
        """``images`` of several batches in their order; a loader with workers makes them there."""
        for index, key in batches:
            yield self.images(index, key)

    def crops_of(self, index: Tensor) -> dict[str, Tensor]:
        """The crop behind each key, to be stored; empty where the key alone determines it.

        Args:
            index: int64 ``[B]``, positions in the full array.

        Returns:
            ``box``, float32 ``[B * key_count, 4]``: top, left, height and width as fractions of the upright image; and
            ``flip``, bool ``[B * key_count]``.
        """
        return {}

    @abstractmethod
    def __iter__(self) -> Iterator[Batch]:
        """One pass. Draw nothing before the first batch: Lightning creates the iterator before it sets the epoch."""
