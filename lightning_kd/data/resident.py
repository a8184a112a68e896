"""The loader of small sets: every sample decoded once, a batch is one index operation."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from lightning_kd.core.batch import Batch
from lightning_kd.data.augment import CropFlip, Normalize, cut_out_, draw_centres
from lightning_kd.data.sampling import BatchLoader, ShardedSampler


class ResidentLoader(BatchLoader):
    """Batches from tensors that stay in memory, on the device of the training.

    The stored samples are moved to ``device`` when the loader is made, and crop, flip, normalisation and cutout run
    there. Random views are drawn on the CPU for all samples of the array at once from the stream (seed, epoch, pass)
    and looked up by index, so they do not depend on the batch size, the device or the number of processes. Yields
    ``Batch`` with ``image`` float32, ``target`` int64, ``index`` int64 and no extras, all on ``device``.

    Args:
        image: uint8 ``[N, C, H, W]``, or float features ``[N, D]``: the full array of the split.
        target: int64 ``[N]``.
        sampler: which samples form the batches of this process.
        normalize: brings stored samples to float32.
        augment: the random view of each image; ``None`` takes images as they are.
        cutout: the side of the cutout box in pixels; 0 is off.
        device: where the batches are made.
    """

    def __init__(
        self,
        image: Tensor,
        target: Tensor,
        sampler: ShardedSampler,
        normalize: Normalize,
        *,
        augment: CropFlip | None = None,
        cutout: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__(sampler)
        self.augment = augment
        self.cutout = cutout
        self.device = torch.device(device)
        self._size = (image.shape[-2], image.shape[-1]) if image.ndim == 4 else (1, 1)
        self._image = (image if augment is None else augment.pad(image)).to(self.device)
        self._target = target.to(self.device)
        self._normalize = normalize.to(self.device)

    def __iter__(self) -> Iterator[Batch]:
        epoch, pass_, batches = self.sampler.next_pass()
        order = torch.from_numpy(np.concatenate(batches)).to(self.device)
        count, seed = len(self._target), self.sampler.seed
        view = centre = torch.empty(0)
        if self.augment is not None:
            view = self.augment.draw(count, seed, epoch, pass_).to(self.device)
        if self.cutout:
            centre = draw_centres(count, self._size, seed, epoch, pass_).to(self.device)
        for part in order.split([len(batch) for batch in batches]):
            index = part.clone()  # a slice would drag the whole order along when it is saved or sent
            if self.augment is not None:
                image = self.augment.gather(self._image, index, view[index])
            else:
                image = self._image.index_select(0, index)
            image = self._normalize(image)
            if self.cutout:
                cut_out_(image, centre[index], self.cutout)
            yield Batch(image, self._target.index_select(0, index), index, {})
