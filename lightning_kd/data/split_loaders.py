"""The loaders of a data module, over chosen samples of a split, for one process."""

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
    """The loaders of a data module whose arrays and splits are ready; see ``LabelledDataModule``."""

    #: the AutoAugment policy of strong views
    strong_policy = AutoAugmentPolicy.CIFAR10
    #: further tensors for ``Batch.extras`` of training samples, by name, a row for each sample of the full array
    train_extras: dict[str, Tensor] = {}
    #: cells per row and per column of an image, for the views of cells; ``None`` without such views
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
        """Load the data and make its splits, once."""

    def check_files(self, *splits: str) -> None:
        """A hook called before samples of ``splits`` are used, for data that is read only then."""

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
        """A loader over chosen samples of a split, for this process. Creating one is cheap.

        ``Batch.image`` is a tensor, or with several ``views`` a tuple of tensors, drawn independently for each sample:

        - ``"plain"``: the image as in evaluation;
        - ``"weak"``: the augmentation and the cutout of this module;
        - ``"strong"``: AutoAugment, then the augmentation of this module, then a cutout of half the shorter side. (With
          ``ImageFolderDataModule``, the augmentation of the module, then AutoAugment, on the small image.)

        With several labels per sample, strong views are a square of a random colour instead of that cutout, then
        RandAugment, then the augmentation of this module; and there are

        - ``"patches"``: ``1 + n_grid ** 2`` plain views, the whole image and its cells row by row, each cell resized to
          the size of the image;
        - ``"strong_patches"``: the same with strong views.

        Masks get the same crop and flip as their images. ``Batch.extras`` holds further tensors about the samples.

        Args:
            split: ``"train"``, ``"val"``, ``"test"``, or ``"predict"`` where there are such samples.
            indices: int64, positions in the full array of the split (for ``"val"`` the array that it is taken from,
                mostly the training array). Default: the samples in use.
            shuffle: a new order in each epoch, and the last batch as in training (see ``ShardedSampler``); with
                ``balance``, each class of training samples, by their current labels, is equally frequent.
            augment: a weak view instead of a plain one; ignored where ``views`` is given.
            batch_size: samples per batch and process. Default: ``batch_size`` of the module with ``shuffle``, else
                ``eval_batch_size``.
            views: names of the views; a sequence gives a tuple of tensors, a single name a tensor.
            stream: a name; each name gives another order and other views from the same seed.
            drop_last: with ``shuffle``, leave out a last batch that is smaller than the others, unless it is the only
                one.
            view_keys: add ``view`` to ``Batch.extras``, the key of each image's view, int64 ``[B]``; only for a single
                view that is plain or a crop and flip.

        Returns:
            A loader of ``Batch``, a new pass over the samples each time it is iterated.

        Raises:
            ValueError: for an unknown split or view, indices out of range, strong views of features, or keys of views
                that have none.
        """
        self.setup("predict" if split == "predict" else None)
        if split not in ("train", "val", "test") and (split != "predict" or self.predict is None):
            raise ValueError(f"split must be 'train', 'val' or 'test', got {split!r}: choose one")
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
        """Everything but the views that a network's outputs for the training images depend on, as plain values."""
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
        """The first operations of strong views, for samples in memory."""
        return BatchedAutoAugment(self.strong_policy)

    def _stored_on_device(self, name: str, fill: int = 0) -> StoredImages:
        """A full array on the training device, shared by all loaders."""
        values, device = getattr(self, name), self._process()[2]
        stored = self._stored.get(name)
        if stored is None or stored.source is not values or stored.device != device:
            stored = self._stored[name] = StoredImages(values, device, fill)
        return stored

    def _extras(self, source: str) -> dict[str, Tensor]:
        """Further tensors for ``Batch.extras``, a row for each sample of a full array."""
        return dict(self.train_extras) if source == "train" else {}

    def _process(self) -> tuple[int, int, torch.device]:
        """Rank, number of processes and device of the Trainer; without one ``0, 1`` and the CPU."""
        if self.trainer is None:
            return 0, 1, torch.device("cpu")
        return self.trainer.global_rank, self.trainer.world_size, self.trainer.strategy.root_device

    def train_dataloader(self) -> Any:
        """The loader that the task's ``train_loader(data)`` returns; by default all training samples, augmented."""
        return train_loader_of(self)

    def val_dataloader(self) -> BatchLoader | list[BatchLoader]:
        self.setup()
        return self.loader("val") if len(self.val_indices) else []

    def test_dataloader(self) -> BatchLoader:
        return self.loader("test")

    def predict_dataloader(self) -> BatchLoader:
        return self.loader("test" if self.predict is None else "predict")


def train_loader_of(data: Any) -> Any:
    """The loader that the Trainer's task returns for ``data``; without a task all training samples, augmented."""
    task: Any = getattr(data.trainer, "lightning_module", None)
    if task is None:
        return data.loader("train", shuffle=True, augment=True)
    # any other LightningModule gets the default of Task
    return task.train_loader(data) if hasattr(task, "train_loader") else Task.train_loader(task, data)
