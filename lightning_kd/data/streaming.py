"""The loader of large data sets: image files, decoded and augmented one by one in worker processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_kd.core.batch import Batch
from lightning_kd.core.seeding import derive_seed, torch_generator
from lightning_kd.core.view_keys import VIEW, ViewKeys
from lightning_kd.data.augment import view_seed
from lightning_kd.data.image_files import read_image, truncated_allowed
from lightning_kd.data.sampling import REPEAT, BatchLoader, ShardedSampler, wide

Key = tuple[int, int, int]


Transform = Callable[[Image.Image], Tensor]


@contextmanager
def sample_generator(seed: int, epoch: int, pass_: int, index: int) -> Iterator[None]:
    """Seed torch's CPU generator for one view of one sample in this block, and restore its state afterwards."""
    with torch.random.fork_rng(devices=[]):
        # not torch.manual_seed, which would also reseed the generators of accelerators
        torch.default_generator.manual_seed(derive_seed(seed, "augment", epoch, pass_, index))
        yield


class ImageFiles(Dataset[tuple[Any, Tensor, int]]):
    """Images read from files and transformed, each with a random stream of its own.

    ``[epoch, pass, index]`` gives ``(image, target, index)``. During the transform torch's CPU generator is seeded from
    ``(seed, "augment", epoch, pass, index)``, and its state is restored afterwards, so the result does not depend on
    workers or on earlier draws. Several views of an image have a seed each.

    Args:
        paths: the image files.
        target: int64 ``[N]``, or another tensor with one row per image.
        transform: from a PIL image in RGB to a tensor; with a sequence ``image`` is a tuple of their results.
        seed: of the random streams.
        background: see ``read_image``.
        truncated: accept truncated files.
        image_range: see ``read_image``.
    """

    def __init__(
        self,
        paths: list[str],
        target: Tensor,
        transform: Transform | Sequence[Transform],
        seed: int,
        background: Sequence[int] = (255, 255, 255),
        image_range: Sequence[float] | None = None,
        truncated: bool = False,
    ) -> None:
        self.truncated = truncated
        self.background = background
        self.image_range = image_range
        self.paths = paths
        self.target = target
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> Image.Image:
        """The image before its transform: RGB, upright."""
        with truncated_allowed(self.truncated):
            return read_image(self.paths[index], self.background, self.image_range)

    def __getitem__(self, key: Key) -> tuple[Any, Tensor, int]:
        epoch, pass_, index = key
        image = self.read(index)
        transforms = self.transform if isinstance(self.transform, Sequence) else [self.transform]
        views = []
        for k, transform in enumerate(transforms):
            with sample_generator(view_seed(self.seed, k), epoch, pass_, index):
                views.append(transform(image))
        return tuple(views) if isinstance(self.transform, Sequence) else views[0], self.target[index], index


class _KeyedBatches:
    """Batches of (epoch, pass, index), by which the epoch reaches workers that are kept over epochs."""

    def __init__(self, sampler: ShardedSampler) -> None:
        self.sampler = sampler

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, pass_, batches = self.sampler.next_pass()
        repeats = self.sampler.repeats(epoch, pass_)
        for k, batch in enumerate(batches):
            before = [0] * len(batch) if repeats is None else repeats[k].tolist()
            yield [(epoch, pass_ + REPEAT * times, index) for index, times in zip(batch.tolist(), before, strict=True)]


def collate(samples: list[tuple[Any, ...]]) -> Batch:
    """Collate ``(image, target, index)``, or ``(images, target, index, keys)`` with several views, to one ``Batch``."""
    image, target, index, *keys = zip(*samples, strict=True)
    if keys:
        count = torch.tensor([len(key) for key in keys[0]])
        targets = torch.stack(target).repeat_interleave(count, 0)
        return Batch(
            torch.cat(image), targets, torch.tensor(index).repeat_interleave(count), {VIEW: torch.cat(keys[0])}
        )
    several = isinstance(image[0], tuple)
    stacked = tuple(torch.stack(view) for view in zip(*image, strict=True)) if several else torch.stack(image)
    return Batch(stacked, torch.stack(target), torch.tensor(index), {})


class KeyedFiles(ImageFiles):
    """Image files whose views have keys, see ``CropFiles`` and ``PlainFiles``.

    ``[epoch, pass, index]`` gives ``(images [n, 3, S, S], target, index, keys [n])``, the views of one visit.

    Args:
        files: the image files.
        keys: chooses the views of each visit.
        count: the number of views of each image.
    """

    def __init__(self, files: ImageFiles, keys: ViewKeys, count: int) -> None:
        self.__dict__.update(files.__dict__)
        self.keys, self.count = keys, count

    def cut(self, index: int, keys: np.ndarray) -> Tensor:
        """The views ``keys`` of an image, ``[n, 3, S, S]``; its file is read once."""
        raise NotImplementedError

    def crops(self, index: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Boxes and flips of all views of an image, see ``StoredCrops.of``; ``None`` if the views are no crops."""
        raise NotImplementedError

    def __getitem__(self, key: Key) -> tuple[Any, ...]:  # type: ignore[override]  # with the keys of its views
        epoch, pass_, index = key
        (keys,) = self.keys.visits(np.array([index]), self.count, self.seed, epoch, pass_)
        return self.cut(index, keys), self.target[index], index, torch.from_numpy(keys)

    def describe(self) -> dict[str, Any]:
        """Everything that the views depend on, as plain values."""
        raise NotImplementedError


#: an image and the keys of the views to cut out of it; ``None`` for the boxes and flips of all its views
Job = tuple[int, np.ndarray | None]


class _Jobs(Dataset[Any]):
    """Returns the views, or the boxes and flips, of a job."""

    def __init__(self, files: KeyedFiles) -> None:
        self.files = files

    def __getitem__(self, job: Job) -> Any:
        index, keys = job
        return self.files.crops(index) if keys is None else self.files.cut(index, keys)


def _alone(results: list[Any]) -> Any:
    (result,) = results
    return result


class StreamingLoader(BatchLoader):
    """Batches of image files from the workers of a ``torch.utils.data.DataLoader``. Yields ``Batch`` on the CPU.

    The DataLoader is hidden from Lightning, which would replace its sampler, and would start its workers on the batches
    of epoch 0 before a resumed run has set its epoch.

    Args:
        dataset: the images, indexed by (epoch, pass, index).
        sampler: chooses the samples of each batch of this process.
        num_workers: number of worker processes, kept over epochs; 0 decodes in this process.
        pin_memory: whether batches are copied to a CUDA device.
        extras: further tensors by name, with first dimension ``N``; ``Batch.extras`` gets their rows.
        keyed: gives the images with keys for their views; ``None`` where views have none.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        sampler: ShardedSampler,
        *,
        num_workers: int = 0,
        pin_memory: bool = False,
        extras: dict[str, Tensor] | None = None,
        keyed: Callable[[ViewKeys], KeyedFiles] | None = None,
    ) -> None:
        super().__init__(sampler)
        self._extras = extras or {}
        self._num_workers, self._pin_memory = num_workers, pin_memory
        self._keyed = keyed
        self._files: KeyedFiles | None = None
        self._jobs: list[list[Job]] = []
        self._workers: DataLoader[Any] | None = None
        self._loader = self._load(dataset)

    def _load(self, dataset: Dataset[Any]) -> DataLoader[tuple[Any, Tensor, int]]:
        return DataLoader(
            dataset,
            batch_sampler=_KeyedBatches(self.sampler),  # type: ignore[arg-type]
            num_workers=self._num_workers,
            collate_fn=collate,
            pin_memory=self._pin_memory,
            persistent_workers=self._num_workers > 0,
            generator=torch_generator(self.sampler.seed, "workers"),  # by default it draws from the global generator
        )

    def give_keys(self, keys: ViewKeys) -> None:
        if self._keyed is None:
            super().give_keys(keys)
            return
        self._files, self._workers = self._keyed(keys), None
        self._loader = self._load(self._files)

    @property
    def key_count(self) -> int:
        return self._with_keys.count

    def describe_keys(self) -> dict[str, Any]:
        return self._with_keys.describe()

    def images(self, index: Tensor, key: Tensor) -> Tensor:
        return torch.cat([self._with_keys.cut(image, keys) for image, keys in _by_image(index, key)])

    def images_of(self, batches: Sequence[tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
        jobs = [_by_image(*batch) for batch in batches]
        results = self._results([job for some in jobs for job in some])
        for (index, _), some in zip(batches, jobs, strict=True):
            image, begin = torch.empty(0), 0
            for _ in some:  # copied at once, because each tensor from a worker keeps a file open
                part = next(results)
                image = part.new_empty(len(index), *part.shape[1:]) if begin == 0 else image
                image[begin : begin + len(part)] = part
                begin += len(part)
            yield image

    def crops_of(self, index: Tensor) -> dict[str, Tensor]:
        found = [crops for crops in self._results([(each, None) for each in index.tolist()]) if crops is not None]
        if not found:
            return {}
        boxes, flips = zip(*found, strict=True)
        return {"box": torch.from_numpy(np.concatenate(boxes)), "flip": torch.from_numpy(np.concatenate(flips))}

    def _results(self, jobs: list[Job]) -> Iterator[Any]:
        """The result of each job, in their order; computed by the workers, if there are any."""
        work = _Jobs(self._with_keys)
        if self._num_workers == 0:
            yield from map(work.__getitem__, jobs)
            return
        if self._workers is None:  # kept from one call to the next
            self._workers = DataLoader(
                work,
                batch_sampler=self._jobs,
                num_workers=self._num_workers,
                collate_fn=_alone,
                persistent_workers=True,
                generator=torch_generator(self.sampler.seed, "workers"),
            )
        self._jobs[:] = [[job] for job in jobs]
        yield from self._workers

    @property
    def _with_keys(self) -> KeyedFiles:
        assert self._files is not None, "give_keys comes first"
        return self._files

    @property
    def _iterator(self) -> Any:
        """The DataLoader's iterator: Lightning stops a loader's workers by this attribute, and sets it to ``None``."""
        return self._loader._iterator

    @_iterator.setter
    def _iterator(self, iterator: Any) -> None:
        self._loader._iterator = iterator

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._loader:
            known = {name: wide(value[batch.index]) for name, value in self._extras.items()}
            yield batch._replace(extras=known | batch.extras)


def _by_image(index: Tensor, key: Tensor) -> list[tuple[int, np.ndarray]]:
    """Groups the views ``[B]`` of images ``[B]``: neighbouring views of the same image are one group."""
    images, counts = index.unique_consecutive(return_counts=True)
    return [(int(image), part.numpy()) for image, part in zip(images, key.split(counts.tolist()), strict=True)]
