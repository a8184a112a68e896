"""Loaders over the samples of a split, for the process that asks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import AutoAugmentPolicy

from lightning_kd.core.problems import Problem, Segmentation
from lightning_kd.core.seeding import derive_seed, stream_seed
from lightning_kd.core.task import Task
from lightning_kd.core.view_keys import ViewKeys
from lightning_kd.data.augment import CropFlip, Normalize, check_views
from lightning_kd.data.auto_augment import BatchedAutoAugment
from lightning_kd.data.data_digest import image_digest
from lightning_kd.data.resident import ResidentLoader, StoredImages
from lightning_kd.data.sampling import BatchLoader, ShardedSampler


class SplitLoaders(L.LightningDataModule):
    """What a data module offers once ``setup`` has made its arrays and splits; see ``LabelledDataModule``."""

    #: what strong views start with
    strong_policy = AutoAugmentPolicy.CIFAR10
    #: what else is known of each training sample, by name, first dimension that of the full array
    train_extras: dict[str, Tensor] = {}
    #: cells of an image in a row and in a column, where there are views of them
    n_grid: int | None = None

    problem: Problem
    input_shape: tuple[int, ...]
    class_names: list[str]
    mean: list[float]
    std: list[float]
    batch_size: int
    eval_batch_size: int
    crop_flip: CropFlip | None
    cutout: int
    balance: bool
    seed: int
    predict: str | None
    val_indices: np.ndarray
    train_image: Any
    train_target: Tensor
    _val_source: str
    _stored: dict[str, StoredImages]

    def setup(self, stage: str | None = None) -> None:
        """Make the arrays and splits, once."""

    def check_files(self, *splits: str) -> None:
        """Called before samples of ``splits`` are used, for data that is read only then."""

    def loader(
        self,
        split: str = "train",
        indices: np.ndarray | Tensor | None = None,
        *,
        shuffle: bool = False,
        augment: bool = False,
        batch_size: int | None = None,
        views: str | Sequence[str] | None = None,
        stream: str = "",
        drop_last: bool = False,
        view_keys: ViewKeys | None = None,
    ) -> BatchLoader:
        """A loader over any samples of a split, for this process. Making one is cheap, however often.

        ``Batch.image`` is a tensor, or with several ``views`` a tuple of them, each drawn on its own for each sample:

        - ``"plain"``: the image as an evaluation sees it;
        - ``"weak"``: the augmentation and the cutout of this module;
        - ``"strong"``: AutoAugment, then the augmentation of this module, then a cutout of half the shorter side. (With
          ``ImageFolderDataModule``, the augmentation of the module, then AutoAugment, on the small image.)

        With several labels a sample, strong views are a box of a random colour in place of that cutout, then
        RandAugment, then the augmentation of this module; and there are

        - ``"patches"``: ``1 + n_grid ** 2`` views, the whole image and its cells row by row, each brought to the size
          of the image, as an evaluation sees them;
        - ``"strong_patches"``: the same, of each a strong view.

        Masks of the same samples get the same crop and flip. ``Batch.extras`` holds what else is known of each sample.

        Args:
            split: ``"train"``, ``"val"``, ``"test"``, or ``"predict"`` where there are such samples.
            indices: positions in the full array of the split (``"val"``: in the array it is taken from, mostly the
                training one); by default those in use.
            shuffle: a new order each epoch, and the training rule for the last batch; with ``balance`` of the module,
                each class of training samples, by the labels given now, equally often.
            augment: a weak view rather than a plain one; of no account where ``views`` is given.
            batch_size: samples a batch and process; by default ``batch_size`` with ``shuffle``, else
                ``eval_batch_size``.
            views: names of the views; a sequence gives a tuple of tensors, a name alone one tensor.
            stream: a name; each gives another order and other views from the same seed.
            drop_last: with ``shuffle``, leave out a last batch that is smaller than the others, unless it is the only
                one.
            view_keys: let ``Batch.extras`` say as ``view`` which view each image is, int64 ``[B]``; for one view by
                crop and flip, or a plain one.

        Raises:
            ValueError: for an unknown split or view, indices out of range, strong views of features, and keys of views
                that are not counted.
        """
        self.setup("predict" if split == "predict" else None)
        if split not in ("train", "val", "test") and (split != "predict" or self.predict is None):
            raise ValueError(f"split must be 'train', 'val' or 'test', got {split!r}: give one of them")
        self.check_files(split)
        if views is None:
            views = "weak" if augment else "plain"
        check_views(views, self.input_shape, masks=isinstance(self.problem, Segmentation), n_grid=self.n_grid)
        chosen = np.asarray(getattr(self, f"{split}_indices") if indices is None else indices, dtype=np.int64)
        source = self._val_source if split == "val" else split
        count = len(getattr(self, f"{source}_target"))
        if len(chosen) and not 0 <= chosen.min() <= chosen.max() < count:
            raise ValueError(
                f"indices must be between 0 and {count - 1} in split {split!r}, got {chosen.min()} to {chosen.max()}: "
                "give positions in the full array"
            )
        rank, world_size, _ = self._process()
        default = self.batch_size if shuffle else self.eval_batch_size
        seed = stream_seed(self.seed)
        sampler = ShardedSampler(
            chosen,
            default if batch_size is None else batch_size,
            shuffle=shuffle,
            seed=derive_seed(seed, f"loader/{stream}") if stream else seed,
            rank=rank,
            world_size=world_size,
            drop_last=drop_last,
            classes=self.train_target.numpy()[chosen] if self.balance and shuffle and split == "train" else None,
        )
        loader = self._make_loader(source, sampler, views)
        if view_keys is not None:
            loader.give_keys(view_keys)
        return loader

    def _make_loader(self, source: str, sampler: ShardedSampler, views: str | Sequence[str]) -> BatchLoader:
        image = getattr(self, f"{source}_image")
        masks = isinstance(self.problem, Segmentation) and source != "predict"
        return ResidentLoader(
            self._stored_on_device(f"{source}_image"),
            self._stored_on_device(f"{source}_target", fill=-1) if masks else getattr(self, f"{source}_target"),
            sampler,
            Normalize(self.mean, self.std, self.input_shape, 255.0 if image.dtype == torch.uint8 else 1.0),
            augment=self.crop_flip,
            cutout=self.cutout,
            views=views,
            policy=self._policy(),
            extras=self._extras(source),
            n_grid=self.n_grid,
        )

    def training_images(self) -> dict[str, Any]:
        """What the answers of a network to the training images hang on, beside their views, in plain values."""
        self.setup()
        return {
            "count": len(self.train_target),
            "images_sha256": image_digest(self.train_image),
            "input_shape": list(self.input_shape),
            "mean": list(self.mean),
            "std": list(self.std),
            "class_names": list(map(str, self.class_names)),
        }

    def _policy(self) -> BatchedAutoAugment:
        """What strong views of samples in memory start with."""
        return BatchedAutoAugment(self.strong_policy)

    def _stored_on_device(self, name: str, fill: int = 0) -> StoredImages:
        """A full array for all loaders to share."""
        values, device = getattr(self, name), self._process()[2]
        stored = self._stored.get(name)
        if stored is None or stored.source is not values or stored.device != device:
            stored = self._stored[name] = StoredImages(values, device, fill)
        return stored

    def _extras(self, source: str) -> dict[str, Tensor]:
        """What else is known about each sample of a full array."""
        return dict(self.train_extras) if source == "train" else {}

    def _process(self) -> tuple[int, int, torch.device]:
        """Rank, number of processes and device of the trainer; one process on the CPU without one."""
        if self.trainer is None:
            return 0, 1, torch.device("cpu")
        return self.trainer.global_rank, self.trainer.world_size, self.trainer.strategy.root_device

    def train_dataloader(self) -> Any:
        """What the task asks for in its ``train_loader(data)``; by default all training samples, augmented."""
        return train_loader_of(self)

    def val_dataloader(self) -> BatchLoader | list[BatchLoader]:
        self.setup()
        return self.loader("val") if len(self.val_indices) else []

    def test_dataloader(self) -> BatchLoader:
        return self.loader("test")

    def predict_dataloader(self) -> BatchLoader:
        return self.loader("test" if self.predict is None else "predict")


def train_loader_of(data: Any) -> Any:
    """What the task that ``data`` is fitted with asks for, and without one all training samples, augmented."""
    task: Any = getattr(data.trainer, "lightning_module", None)
    if task is None:
        return data.loader("train", shuffle=True, augment=True)
    # a task that is not one of ours gets what ours get by default
    return task.train_loader(data) if hasattr(task, "train_loader") else Task.train_loader(task, data)
