"""The loader of large sets: image files, decoded and augmented one by one in worker processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_kd.core.batch import Batch
from lightning_kd.core.seeding import derive_seed, torch_generator
from lightning_kd.data.augment import view_seed
from lightning_kd.data.image_files import read_image, truncated_allowed
from lightning_kd.data.sampling import REPEAT, BatchLoader, ShardedSampler, wide

Key = tuple[int, int, int]


Transform = Callable[[Image.Image], Tensor]


@contextmanager
def sample_generator(seed: int, epoch: int, pass_: int, index: int) -> Iterator[None]:
    """Inside, torch's CPU generator is that of a view of one sample; afterwards it is as before."""
    with torch.random.fork_rng(devices=[]):
        # this generator alone: torch.manual_seed would reseed the accelerators of this process too
        torch.default_generator.manual_seed(derive_seed(seed, "augment", epoch, pass_, index))
        yield


class ImageFiles(Dataset[tuple[Any, Tensor, int]]):
    """Images read from files, each with random numbers of its own.

    ``[epoch, pass, index]`` gives ``(image, target, index)``. While an image is transformed, torch's CPU generator is
    seeded from ``(seed, "augment", epoch, pass, index)``, and restored afterwards, so that the result does not depend
    on workers or on what was drawn before. Several views of an image are seeded each on its own.

    Args:
        paths: the files.
        target: int64 ``[N]``, or what else each image has one row of.
        transform: from a PIL image in RGB to a tensor; a sequence makes ``image`` a tuple with the result of each.
        seed: the seed of the random numbers.
        background: see ``read_image``, as ``image_range``.
        truncated: take files that are cut off, too.
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

    def __getitem__(self, key: Key) -> tuple[Any, Tensor, int]:
        epoch, pass_, index = key
        with truncated_allowed(self.truncated):
            image = read_image(self.paths[index], self.background, self.image_range)
        transforms = self.transform if isinstance(self.transform, Sequence) else [self.transform]
        views = []
        for k, transform in enumerate(transforms):
            with sample_generator(view_seed(self.seed, k), epoch, pass_, index):
                views.append(transform(image))
        return tuple(views) if isinstance(self.transform, Sequence) else views[0], self.target[index], index


class _KeyedBatches:
    """Batches of (epoch, pass, index): this is how the epoch reaches workers that outlive it."""

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


def collate(samples: list[tuple[Any, Tensor, int]]) -> Batch:
    """``(image, target, index)`` of each sample to one ``Batch``."""
    image, target, index = zip(*samples, strict=True)
    several = isinstance(image[0], tuple)
    stacked = tuple(torch.stack(view) for view in zip(*image, strict=True)) if several else torch.stack(image)
    return Batch(stacked, torch.stack(target), torch.tensor(index), {})


class StreamingLoader(BatchLoader):
    """Batches of image files through the workers of a ``torch.utils.data.DataLoader``. Yields ``Batch`` on the CPU.

    The DataLoader is hidden from Lightning, which would put a sampler of its own into it, and start its workers on the
    batches of epoch 0 before a resumed run has set its epoch.

    Args:
        dataset: the images, asked for by (epoch, pass, index).
        sampler: which samples form the batches of this process.
        num_workers: worker processes, kept over the epochs; 0 decodes in this process.
        pin_memory: whether the batches go to a CUDA device.
        extras: further tensors by name, first dimension ``N``, whose rows each batch has in ``extras``.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        sampler: ShardedSampler,
        *,
        num_workers: int = 0,
        pin_memory: bool = False,
        extras: dict[str, Tensor] | None = None,
    ) -> None:
        super().__init__(sampler)
        self._extras = extras or {}
        self._loader: DataLoader[tuple[Any, Tensor, int]] = DataLoader(
            dataset,
            batch_sampler=_KeyedBatches(sampler),  # type: ignore[arg-type]
            num_workers=num_workers,
            collate_fn=collate,
            pin_memory=pin_memory,
            persistent_workers=num_workers > 0,
            generator=torch_generator(sampler.seed, "workers"),  # or it would draw from the global one
        )

    @property
    def _iterator(self) -> Any:
        """The workers: Lightning stops those of any loader with this attribute, and sets it to ``None``."""
        return self._loader._iterator

    @_iterator.setter
    def _iterator(self, iterator: Any) -> None:
        self._loader._iterator = iterator

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._loader:
            yield batch._replace(extras={name: wide(value[batch.index]) for name, value in self._extras.items()})
