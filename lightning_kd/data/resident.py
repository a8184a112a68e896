"""The loader of small data sets: samples stay decoded in memory, and a batch is one index operation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_kd.core.batch import Batch
from lightning_kd.core.view_keys import VIEW, ViewKeys
from lightning_kd.data.augment import (
    PATCHES,
    CropFlip,
    Normalize,
    check_views,
    cut_cell,
    cut_out_,
    draw_centres,
    expand_views,
    view_seed,
)
from lightning_kd.data.auto_augment import BatchedAutoAugment
from lightning_kd.data.sampling import REPEAT, BatchLoader, ShardedSampler, wide

# AutoAugment processes several batches of this many bytes in all at once: more images then share an operation
STRONG_BYTES = 8 << 20


class StoredImages:
    """The samples of one array on one device, and padded copies of them, each made when first needed.

    Loaders that share a ``StoredImages`` share its memory. Copies do not follow later in-place changes of ``source``.

    Args:
        source: uint8 ``[N, C, H, W]``, float features ``[N, D]``, or masks ``[N, H, W]``, whose copies are
            ``[N, 1, H, W]``.
        device: device of the copies.
        fill: value of the padding.
    """

    def __init__(self, source: Tensor, device: str | torch.device = "cpu", fill: int = 0) -> None:
        self.source = source
        self.fill = fill
        self.device = torch.device(device)
        self._copies: dict[int | None, Tensor] = {}

    def get(self, crop_flip: CropFlip | None = None) -> Tensor:
        """The samples on the device, padded for ``crop_flip`` if given."""
        key = None if crop_flip is None else crop_flip.padding
        if key not in self._copies:
            image = self.source[:, None] if self.source.ndim == 3 else self.source
            if crop_flip is not None:
                image = crop_flip.pad(image, self.fill)
            self._copies[key] = image.to(self.device)
        return self._copies[key]


# number of different views of a sample that is repeated within a pass; then they recur
MOST_VIEWS = 32

Parts = tuple[Tensor, ...]


class ResidentLoader(BatchLoader):
    """Batches from tensors that stay in memory on the training device.

    The stored samples are moved to ``device`` once, and all augmentation runs there. Random views are drawn on the CPU
    for all samples of the array at once, from the stream (seed, epoch, pass), and looked up by index, so they do not
    depend on the batch size, the device or the number of processes. Yields ``Batch`` with ``image`` float32, ``target``
    (int64; float32 for several labels) and ``index`` int64, all on ``device``.

    Args:
        image: uint8 ``[N, C, H, W]`` or float features ``[N, D]``, the full array of the split; or a ``StoredImages``
            of it, whose device is then used.
        target: int64 ``[N]``, or another tensor with one row per sample. Masks, int16 ``[N, H, W]``, are cropped and
            flipped with their images and yielded as int64; they may be a ``StoredImages`` with ``fill=-1``.
        sampler: chooses the samples of each batch of this process.
        normalize: normalises stored samples to float32.
        augment: the random crop and flip of weak and strong views; ``None`` for none.
        cutout: side in pixels of the cutout square of weak views; 0 is off.
        device: device on which batches are made.
        views: ``"plain"``, ``"weak"`` or ``"strong"``, or a sequence of them, for which ``image`` is a tuple; with
            ``n_grid`` also ``"patches"`` and ``"strong_patches"``, see ``SplitLoaders.loader``.
        policy: the first operations of strong views. Default: AutoAugment's policy for CIFAR-10. They end with a cutout
            of half the shorter side, unless the policy includes one.
        n_grid: cells per row and per column of an image, for patches.
        extras: further tensors by name, with first dimension ``N``; ``Batch.extras`` gets their rows.

    Raises:
        ValueError: for an unknown view, and for strong views of samples that are not images of 1 or 3 channels.
    """

    def __init__(
        self,
        image: Tensor | StoredImages,
        target: Tensor | StoredImages,
        sampler: ShardedSampler,
        normalize: Normalize,
        *,
        augment: CropFlip | None = None,
        cutout: int = 0,
        device: str | torch.device = "cpu",
        views: str | Sequence[str] = "weak",
        policy: BatchedAutoAugment | None = None,
        extras: dict[str, Tensor] | None = None,
        n_grid: int | None = None,
    ) -> None:
        super().__init__(sampler)
        self._stored = image if isinstance(image, StoredImages) else StoredImages(image, device)
        shape = self._stored.source.shape
        if isinstance(target, Tensor) and target.ndim == 3 and not target.is_floating_point():
            target = StoredImages(target, self._stored.device, fill=-1)
        self._masks = target if isinstance(target, StoredImages) else None
        self.views = check_views(views, tuple(shape[1:]), masks=self._masks is not None, n_grid=n_grid)
        self.n_grid = n_grid
        self.augment = augment
        self.cutout = cutout
        self.device = self._stored.device
        self._single = isinstance(views, str) and views not in PATCHES
        self._size = (shape[-2], shape[-1]) if len(shape) == 4 else (1, 1)
        self._target = target.to(self.device) if isinstance(target, Tensor) else target.source
        self._normalize = normalize.to(self.device)
        self._policy = policy or BatchedAutoAugment()
        self._extras = {name: value.to(self.device) for name, value in (extras or {}).items()}
        self._keys: ViewKeys | None = None
        self._fixed: Tensor | None = None

    def give_keys(self, keys: ViewKeys) -> None:
        if not self._single or self.views[0] == "strong" or (self.views[0] == "weak" and self.cutout):
            cutout = f" and cutout={self.cutout}" * bool(self.cutout)
            raise ValueError(
                f"keys need a single view by crop and flip, got views={self.views}{cutout}: leave out the others"
            )
        table = keys.table(len(self._target), self._views_of_each())
        self._keys, self._fixed = keys, None if table is None else torch.from_numpy(table).to(self.device)

    @property
    def key_count(self) -> int:
        return self._views_of_each() if self._fixed is None else self._fixed.shape[1]

    def describe_keys(self) -> dict[str, Any]:
        crops = None if self.views == ("plain",) else self.augment
        found: dict[str, Any] = (
            {"padding": crops.padding, "flip": crops.flip} if crops else {"padding": 0, "flip": False}
        )
        return found | {"fixed": self._keys and self._keys.fixed, "seed": self._keys and self._keys.seed}

    def images(self, index: Tensor, key: Tensor) -> Tensor:
        index, view = index.to(self.device), key.to(self.device)
        if self.augment is None or self.views == ("plain",):
            return self._normalize(self._stored.get().index_select(0, index))
        if self._fixed is not None:
            view = self._fixed[index, view]
        return self._normalize(self.augment.gather(self._stored.get(self.augment), index, view))

    def _views_of_each(self) -> int:
        return 1 if self.augment is None or self.views == ("plain",) else self.augment.views

    def __iter__(self) -> Iterator[Batch]:
        if self._keys is not None and self._keys.per_visit > 1:
            yield from self._visits(self._keys)
            return
        epoch, pass_, batches = self.sampler.next_pass()
        order = torch.from_numpy(np.concatenate(batches)).to(self.device)
        parts = order.split([len(batch) for batch in batches])
        makers = {"plain": self._plain, "weak": self._weak, "strong": self._strong}
        repeats = self.sampler.repeats(epoch, pass_)
        times = np.zeros(1, np.int64) if repeats is None else np.concatenate(repeats) % MOST_VIEWS
        # position of each sample's draws: the draws for the n-th repetition follow n arrays of draws later
        slots = order + torch.from_numpy(times * len(self._target)).to(self.device)
        drawn = slots.split([len(batch) for batch in batches])
        passes = [pass_ + REPEAT * k for k in range(int(times.max()) + 1)]
        images = [
            makers[name](cell, parts, drawn, passes, view_seed(self.sampler.seed, k), epoch)
            for k, (name, cell) in enumerate(expand_views(self.views, self.n_grid))
        ]
        masks = self._mask_views(parts, passes, view_seed(self.sampler.seed, 0), epoch) if self._masks else None
        keys = None if self._keys is None else self._draw_keys(passes, view_seed(self.sampler.seed, 0), epoch)
        for part, slot, *views in zip(parts, drawn, *images, strict=True):
            index = part.clone()  # pickling a slice would include the whole order
            extras = {name: wide(value.index_select(0, index)) for name, value in self._extras.items()}
            if keys is not None:
                extras[VIEW] = keys.index_select(0, slot)
            target = self._target.index_select(0, index) if masks is None else next(masks)
            yield Batch(views[0] if self._single else tuple(views), target, index, extras)

    def _visits(self, keys: ViewKeys) -> Iterator[Batch]:
        """Batches with several views of each sample, one after another."""
        epoch, pass_, batches = self.sampler.next_pass()
        repeats = self.sampler.repeats(epoch, pass_) or [np.zeros_like(batch) for batch in batches]
        for batch, times in zip(batches, repeats, strict=True):
            drawn = keys.visits(batch, self.key_count, self.sampler.seed, epoch, pass_ + REPEAT * times)
            index = torch.from_numpy(batch).to(self.device).repeat_interleave(keys.per_visit)
            key = torch.from_numpy(drawn).flatten().to(self.device)
            extras = {name: wide(value.index_select(0, index)) for name, value in self._extras.items()}
            yield Batch(self.images(index, key), self._target.index_select(0, index), index, extras | {VIEW: key})

    def _mask_views(self, parts: Parts, passes: list[int], seed: int, epoch: int) -> Iterator[Tensor]:
        """The masks of each batch, with the crop and flip of their images, drawn from the same stream."""
        assert self._masks is not None
        crop_flip = self.augment if self.views[0] == "weak" else None
        stored = self._masks.get(crop_flip)
        view, _ = self._draw(0, passes, seed, epoch)
        for index in parts:
            some = stored.index_select(0, index) if crop_flip is None else crop_flip.gather(stored, index, view[index])
            yield some[:, 0].long()

    def _plain(
        self, cell: int | None, parts: Parts, drawn: Parts, passes: list[int], seed: int, epoch: int
    ) -> Iterator[Tensor]:
        stored = self._stored.get()
        for index in parts:
            yield self._normalize(self._cell(stored.index_select(0, index), cell))

    def _cell(self, image: Tensor, cell: int | None) -> Tensor:
        return image if cell is None else cut_cell(image, cell, self.n_grid or 1)

    def _weak(
        self, cell: int | None, parts: Parts, drawn: Parts, passes: list[int], seed: int, epoch: int
    ) -> Iterator[Tensor]:
        view, centre = self._draw(self.cutout, passes, seed, epoch)
        stored = self._stored.get(self.augment)
        for index, slot in zip(parts, drawn, strict=True):
            yield self._view(stored, index, view[slot], centre[slot], self.cutout)

    def _strong(
        self, cell: int | None, parts: Parts, drawn: Parts, passes: list[int], seed: int, epoch: int
    ) -> Iterator[Tensor]:
        cutout = 0 if self._policy.cuts_out else min(self._size) // 2
        view, centre = self._draw(cutout, passes, seed, epoch)
        choice = np.concatenate([self._policy.draw(len(self._target), seed, epoch, pass_) for pass_ in passes])
        stored = self._stored.get()
        together = max(1, STRONG_BYTES // (stored[0].numel() * self.batch_size))
        for start in range(0, len(parts), together):
            some, slots = parts[start : start + together], drawn[start : start + together]
            image = self._cell(stored.index_select(0, torch.cat(some)), cell)
            image = self._policy.apply(image, choice[torch.cat(slots).cpu().numpy()])
            if self.augment is not None:
                image = self.augment.pad(image)
            rows = torch.arange(len(image), device=self.device).split([len(slot) for slot in slots])
            for slot, row in zip(slots, rows, strict=True):
                yield self._view(image, row, view[slot], centre[slot], cutout)

    def _draw(self, cutout: int, passes: list[int], seed: int, epoch: int) -> tuple[Tensor, Tensor]:
        """The view (crop and flip) and the cutout centre of all samples, for each of ``passes`` in turn."""
        count = len(self._target)
        nothing = torch.zeros(count * len(passes), 2, dtype=torch.int64)
        view, centre = nothing[:, 0], nothing
        if self.augment is not None:
            view = self._draw_keys(passes, seed, epoch)
        if self._fixed is not None:
            view = self._fixed[torch.arange(count, device=self.device).repeat(len(passes)), view]
        if cutout:
            centre = torch.cat([draw_centres(count, self._size, seed, epoch, pass_) for pass_ in passes])
        return view.to(self.device), centre.to(self.device)

    def _draw_keys(self, passes: list[int], seed: int, epoch: int) -> Tensor:
        """The key of the view of all samples, for each of ``passes`` in turn; 0 where a sample has only one view."""
        count = len(self._target)
        if self.augment is None or self.views == ("plain",):
            return torch.zeros(count * len(passes), dtype=torch.int64, device=self.device)
        among = None if self._fixed is None else self._fixed.shape[1]
        drawn = [self.augment.draw(count, seed, epoch, pass_, among) for pass_ in passes]
        return torch.cat(drawn).to(self.device)

    def _view(self, image: Tensor, rows: Tensor, view: Tensor, centre: Tensor, cutout: int) -> Tensor:
        cropped = image.index_select(0, rows) if self.augment is None else self.augment.gather(image, rows, view)
        normal = self._normalize(cropped)
        return cut_out_(normal, centre, cutout) if cutout else normal
