"""Drawing training samples without augmentation, to measure or change a network: weight shifts, sharpness."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    default_collate,
)

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.batch import Batch, as_batch
from lightning_kd.core.distributed import process_count, process_rank
from lightning_kd.core.seeding import numpy_generator


class Samples(NamedTuple):
    """Some training samples.

    Attributes:
        indices: int64 ``[n]``, ascending: positions in the full training array, over all processes.
        loader: batches of this process's share, without augmentation, equal in every pass; ``Batch`` objects, or what a
            user's dataset gives. No sample is in the shares of two processes.
    """

    indices: np.ndarray
    loader: Iterable[Any]


def sample_source(trainer: L.Trainer) -> Any:
    """The source of a fit's training samples: its data module if it is one of lightning_kd, else its training loader.

    Raises:
        ValueError: if the fit has neither.
    """
    data = getattr(trainer, "datamodule", None)
    if hasattr(data, "loader") and hasattr(data, "train_target"):
        return data
    loader = trainer.train_dataloader
    if isinstance(loader, DataLoader):
        return loader
    raise ValueError(
        f"training samples are drawn from a data module of lightning_kd or a torch DataLoader, got "
        f"{type(loader).__name__}: give the fit one of them"
    )


class OnDevice:
    """The batches of a loader, moved to a Trainer's device and converted to its precision.

    Args:
        trainer: the Trainer.
        loader: a loader that can be iterated repeatedly.
    """

    def __init__(self, trainer: L.Trainer, loader: Iterable[Any]) -> None:
        self.trainer, self.loader = trainer, loader

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            yield self.trainer.strategy.batch_to_device(self.trainer.precision_plugin.convert_input(batch))


def training_samples(
    source: Any,
    count: int | None = None,
    *,
    seed: int = 0,
    stream: str = "samples",
    balanced: bool = False,
    num_classes: int | None = None,
    exclude: np.ndarray | None = None,
) -> Samples:
    """Draw training samples: the same ones on every process and in every call with the same arguments.

    Samples of a data module of lightning_kd come without augmentation. Samples of a user's ``DataLoader`` are read from
    its dataset once and kept in memory, so that random transforms are the same in each pass; only the samples of a
    ``SubsetRandomSampler`` are drawn.

    Args:
        source: the result of ``sample_source``: a data module after ``setup``, or a ``DataLoader`` with a map-style
            dataset.
        count: number of samples; if there are fewer, all. Default: all.
        seed: seed of the draw, together with ``stream``.
        stream: a name; different names give different draws.
        balanced: draw equally many of each class, up to a difference of one, as far as there are enough.
        num_classes: number of classes; needed with ``balanced`` for a ``DataLoader``.
        exclude: positions that are not drawn.

    Raises:
        ValueError: if no sample is left, or a ``DataLoader`` has no map-style dataset or an unknown sampler; with
            ``balanced``, for a label out of range.
        TypeError: with ``balanced``, if the dataset's items are not ``(image, target)``.
    """
    check_numbers(least=1, whole=True, optional=True, count=count)
    generator = numpy_generator(seed, stream)
    if isinstance(source, DataLoader):
        return _from_dataset(source, count, generator, balanced, num_classes, exclude)
    indices = _without(np.asarray(source.train_indices), exclude)
    target = source.train_target.numpy()[indices]
    order = generator.permutation(len(indices))
    if count is not None:
        order = order[_in_turn(target[order], source.num_classes)[:count]] if balanced else order[:count]
    chosen = np.sort(indices[order])
    return Samples(chosen, source.loader("train", chosen))


def _without(indices: np.ndarray, exclude: np.ndarray | None) -> np.ndarray:
    left = indices if exclude is None else np.setdiff1d(indices, exclude)
    if not len(left):
        raise ValueError(
            f"no training sample is left besides the {len(indices)} that are taken: take fewer, or give more data"
        )
    return left


def _in_turn(target: np.ndarray, num_classes: int) -> np.ndarray:
    """Positions in ``target``, one of each class in turn, within a class in their order; unlabelled ones (-1) last."""
    rank = np.full(len(target), len(target), dtype=np.int64)
    for c in range(num_classes):
        of_class = target == c
        rank[of_class] = np.arange(of_class.sum())
    return np.lexsort((np.arange(len(target)), rank))


class _Kept:
    """Batches of dataset items that are kept in memory."""

    def __init__(self, items: list[Any], indices: np.ndarray, batch_size: int, collate: Any) -> None:
        self.items, self.indices, self.batch_size, self.collate = items, indices, batch_size, collate

    def __len__(self) -> int:
        return -(-len(self.items) // self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        for start in range(0, len(self.items), self.batch_size):
            batch = self.collate(self.items[start : start + self.batch_size])
            if isinstance(batch, Batch) or (isinstance(batch, list | tuple) and len(batch) == 2):
                index = torch.from_numpy(self.indices[start : start + self.batch_size])
                batch = as_batch(batch)._replace(index=index)
            yield batch


def _from_dataset(
    loader: DataLoader,
    count: int | None,
    generator: np.random.Generator,
    balanced: bool,
    num_classes: int | None,
    exclude: np.ndarray | None,
) -> Samples:
    dataset = loader.dataset
    if not isinstance(dataset, Sized):
        raise ValueError(f"training samples need a dataset with a length, got {type(dataset).__name__}: give one")
    order = generator.permutation(_without(_positions(loader, len(dataset)), exclude))
    chosen = order if count is None else order[:count]
    kept: dict[int, Any] = {}
    if balanced and count is not None:
        if num_classes is None:
            raise ValueError("num_classes is needed to draw balanced samples from a DataLoader: give it")
        # reading an item is the only way to its label: read until each class has its share, or all is read
        share, room = -(-count // num_classes), np.full(num_classes, -(-count // num_classes))
        taken: list[int] = []
        labels: list[int] = []
        for position in order.tolist():
            item = dataset[position]
            label = int(as_batch(item).target)
            if not 0 <= label < num_classes:
                raise ValueError(
                    f"label {label} of sample {position} is not below num_classes={num_classes}: give the number of "
                    "classes, or draw samples at random"
                )
            if room[label] > 0:
                room[label] -= 1
                kept[position] = item
                taken.append(position)
                labels.append(label)
                if len(taken) == share * num_classes:
                    break
        chosen = np.asarray(taken)[_in_turn(np.asarray(labels), num_classes)[:count]]
    chosen = np.sort(chosen)
    rank, world_size = process_rank(), process_count()
    mine = chosen[rank::world_size]
    items = [kept[p] if p in kept else dataset[p] for p in mine.tolist()]
    return Samples(chosen, _Kept(items, mine, loader.batch_size or 1, loader.collate_fn or default_collate))


def _positions(loader: DataLoader, count: int) -> np.ndarray:
    """The samples of a dataset that a loader trains on."""
    sampler: Any = loader.sampler
    sampler = getattr(getattr(sampler, "dataset", None), "_sampler", sampler)  # inside Lightning's distributed wrapper
    if isinstance(sampler, SubsetRandomSampler):
        return np.unique(np.asarray(sampler.indices, dtype=np.int64))
    if isinstance(sampler, RandomSampler | SequentialSampler | DistributedSampler | WeightedRandomSampler):
        return np.arange(count)
    raise ValueError(
        f"training samples of a loader with a {type(sampler).__name__} are not known: give it a Subset of the dataset "
        "and a random or sequential sampler"
    )
