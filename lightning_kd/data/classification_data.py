"""The base of the data modules for classification."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import AutoAugmentPolicy

from lightning_kd.core.run import run_folder_of
from lightning_kd.core.run_folder import RunFolder
from lightning_kd.core.seeding import derive_seed, numpy_generator, stream_seed
from lightning_kd.core.task import Task
from lightning_kd.data.array_files import Arrays, fake_arrays
from lightning_kd.data.augment import CropFlip, Normalize, check_views
from lightning_kd.data.auto_augment import BatchedAutoAugment
from lightning_kd.data.label_noise import CleanLabels, LabelNoise
from lightning_kd.data.noise_record import check_no_noise, digest, settle_labels
from lightning_kd.data.resident import ResidentLoader, StoredImages
from lightning_kd.data.sampling import BatchLoader, ShardedSampler
from lightning_kd.data.splits import take_fraction, take_per_class, without


class ClassificationDataModule(L.LightningDataModule, ABC):
    """Splits, subsets and loaders over a labelled data set in memory. Subclasses say where it comes from.

    A subclass implements ``load_arrays`` (and ``prepare_data`` where files have to be fetched) and hands the rest to
    ``super().__init__``. All arguments are plain attributes. ``num_classes``, ``input_shape``, ``class_names``,
    ``mean`` and ``std`` can be read at once; the sizes load the data when they are first read.

    After ``setup``: ``train_image``, ``train_target``, ``test_image`` and ``test_target`` are the full arrays (images
    uint8 ``[N, C, H, W]``, features float32 ``[N, D]``, targets int64 ``[N]``), and ``train_indices``,
    ``val_indices`` and ``test_indices`` (int64 arrays, ascending) the positions in them that are used. Validation
    samples come out of the training array, unless the data set has its own ``val_image`` and ``val_target``.

    With ``noise``, ``train_target`` are the given labels, splits and validation samples of the training array
    included, and ``train_clean`` (int64 ``[N]``, else ``None``) the data set's own; its own validation and test labels
    are never changed. The labels are drawn before anything is split. Under a Trainer with a run folder they are kept
    there in ``noise.npz``, and taken from it where a run is resumed or evaluated. Checkpoints hold their sha256, and a
    fit does not go on from one that was trained on other labels. A fit prints how many are wrong.

    Loaders yield ``Batch`` with ``index`` the position in the full array. With ``val_fraction=0`` there is no
    validation loader, so that nothing is selected on the test set. The prediction set is the test set.

    Several processes: only one prepares files. Each rank reads its own part of every batch and Lightning adds no
    sampler; ``batch_size`` is that of one process, and all ranks together see the batches of one process with
    ``world_size`` times that size (see ``ShardedSampler``). No sample is evaluated twice.

    Args:
        class_names: a name for each class; their number is ``num_classes``.
        input_shape: ``(C, H, W)``, or ``(D,)`` for features.
        mean: for each channel (or feature), in units of the full scale; subtracted.
        std: likewise; divided by.
        batch_size: training samples a step and process.
        eval_batch_size: the most samples an evaluation step and process.
        val_fraction: the share of the training samples, of each class alike, that becomes the validation set, 0 to
            below 1.
        train_fraction: train on this share of what is then left, of each class alike, above 0 to 1.
        train_per_class: train on this many samples of each class instead.
        crop_flip: the random view of each training image; ``None`` for none.
        cutout: the side in pixels of a box set to the mean colour in each training image; 0 is off.
        seed: fixes the validation split and the subset, for the same given labels (both are stratified by them);
            together with ``seed_everything`` also the order of the batches and the augmentation; 0 or more.
        fake: use a small made-up data set of the same shape and classes, without any file; all of it, where it is too
            small for the subset asked for.
        noise: gives the training samples wrong labels; ``None`` keeps the data set's own.

    Raises:
        ValueError: for an argument out of its range, and for both ``train_fraction`` and ``train_per_class``.
    """

    #: what strong views start with
    strong_policy = AutoAugmentPolicy.CIFAR10

    train_image: Any
    train_target: Tensor
    train_clean: Tensor | None
    val_image: Any
    val_target: Tensor
    test_image: Any
    test_target: Tensor
    train_indices: np.ndarray
    val_indices: np.ndarray
    test_indices: np.ndarray

    def __init__(
        self,
        *,
        class_names: list[str],
        input_shape: tuple[int, ...],
        mean: list[float],
        std: list[float],
        batch_size: int = 64,
        eval_batch_size: int = 256,
        val_fraction: float = 0.1,
        train_fraction: float | None = None,
        train_per_class: int | None = None,
        crop_flip: CropFlip | None = None,
        cutout: int = 0,
        seed: int = 0,
        fake: bool = False,
        noise: LabelNoise | None = None,
    ) -> None:
        super().__init__()
        check_at_least("batch_size", batch_size, 1)
        check_at_least("eval_batch_size", eval_batch_size, 1)
        check_at_least("cutout", cutout, 0)
        check_at_least("seed", seed, 0)
        if not 0 <= val_fraction < 1:
            raise ValueError(f"val_fraction must be from 0 to below 1, got {val_fraction}: give a share, 0 for none")
        if train_fraction is not None and train_per_class is not None:
            raise ValueError(
                f"train_fraction and train_per_class exclude each other, got {train_fraction} and {train_per_class}: "
                "leave one out"
            )
        if train_fraction is not None and not 0 < train_fraction <= 1:
            raise ValueError(f"train_fraction must be above 0 and at most 1, got {train_fraction}: give a share")
        if train_per_class is not None:
            check_at_least("train_per_class", train_per_class, 1)
        for name, value in (("mean", mean), ("std", std)):
            if len(value) != input_shape[0]:
                raise ValueError(f"{name} must have {input_shape[0]} values, got {list(value)}: one for each channel")
        if not all(value > 0 for value in std):
            raise ValueError(f"std must be above 0, got {list(std)}: give the deviation of each channel")
        self.num_classes = len(class_names)
        self.class_names = list(class_names)
        self.input_shape = tuple(input_shape)
        self.mean = [float(value) for value in mean]
        self.std = [float(value) for value in std]
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.val_fraction = val_fraction
        self.train_fraction = train_fraction
        self.train_per_class = train_per_class
        self.crop_flip = crop_flip
        self.cutout = cutout
        self.seed = seed
        self.fake = fake
        self.noise = noise
        self.train_clean = None
        self._val_source = "train"
        self._ready = False
        self._stored: dict[str, StoredImages] = {}
        self._noise_folder: Path | None = None

    def __str__(self) -> str:
        sizes = f", {self.train_size} + {self.val_size} + {self.test_size} samples" if self._ready else ""
        return f"{type(self).__name__}: {self.num_classes} classes of {self.input_shape}{sizes}"

    @abstractmethod
    def load_arrays(self) -> Arrays:
        """The whole data set, read and checked. Called once, in every process, and not with ``fake``."""

    def fake_arrays(self) -> Arrays:
        """The made-up data set used with ``fake``."""
        return fake_arrays(self.input_shape, self.num_classes)

    def setup(self, stage: str | None = None) -> None:
        """Load and split the data, once, whatever the stage."""
        folder = run_folder_of(self.trainer)
        if getattr(self.trainer, "fast_dev_run", 0):
            folder = None
        if self.noise is None and stage == "fit":
            check_no_noise(folder, self.trainer)
        # labels drawn before there was a run folder must be those recorded in it
        unrecorded = self.noise is not None and folder is not None and folder.path != self._noise_folder
        if not self._ready or unrecorded:
            self._load(folder)
        if self.noise is not None and stage == "fit" and self.trainer is not None and self._process()[0] == 0:
            self._print_rate()

    def _print_rate(self) -> None:
        assert self.train_clean is not None
        is_wrong = (self.train_target != self.train_clean).numpy()
        wrong, count = int(is_wrong[self.train_indices].sum()), len(self.train_indices)
        whole = ""
        if count < len(is_wrong):
            whole = f"; in the whole array {is_wrong.sum()} of {len(is_wrong)}, {is_wrong.mean():.2%}"
        print(
            f"label noise: {wrong} of {count} training labels are wrong ({wrong / count:.2%}{whole}), by {self._noise}"
        )

    def state_dict(self) -> dict[str, Any]:
        """With ``noise``, what checkpoints remember the given labels by: their sha256."""
        return {"labels_sha256": digest(self.train_target.numpy())} if self.noise is not None and self._ready else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Before a fit goes on from a checkpoint.

        Raises:
            ValueError: where that was trained on other labels.
        """
        fitting = self.trainer is not None and self.trainer.state.fn == "fit"
        if fitting and state_dict.get("labels_sha256") != digest(self.train_target.numpy()):
            raise ValueError(
                f"the checkpoint was trained on other labels than those of noise={self._noise}: give the data and the "
                "noise of that run, or start anew without it"
            )

    def _load(self, folder: RunFolder | None) -> None:
        self._ready = False  # until all of it has worked
        arrays = self.fake_arrays() if self.fake else self.load_arrays()
        self.train_image, self.train_target, self.test_image, self.test_target, val_image, val_target = arrays
        if self.noise is not None:
            self.train_clean = self.train_target
            self.train_target = self._given_labels(folder)
            self._noise_folder = None if folder is None else folder.path
        self.test_indices = np.arange(len(self.test_target))
        target = self.train_target.numpy()
        if val_target is not None:
            self.val_image, self.val_target, self._val_source = val_image, val_target, "val"
            self.val_indices, rest = np.arange(len(val_target)), np.arange(len(target))
        else:
            generator = numpy_generator(self.seed, "val_split")
            self.val_indices = take_fraction(target, self.num_classes, self.val_fraction, generator, leave=1)
            if self.val_fraction and not len(self.val_indices):
                raise ValueError(
                    f"val_fraction={self.val_fraction} of {len(target)} samples leaves the validation split empty: "
                    "raise it, or give 0 for no validation"
                )
            rest = without(len(target), self.val_indices)
        self.train_indices = rest[self._subset(target[rest], np.bincount(target, minlength=self.num_classes))]
        self._ready = True

    @property
    def _noise(self) -> LabelNoise | None:
        return self.noise.without_files() if self.fake and self.noise is not None else self.noise

    def _given_labels(self, folder: RunFolder | None) -> Tensor:
        noise = self._noise
        assert noise is not None
        path = getattr(self, "path", None)  # of those modules that read one file
        clean = CleanLabels(
            self.train_target.numpy(), self.class_names, self.train_image, None if path is None else Path(path)
        )
        return torch.from_numpy(settle_labels(noise, clean, folder, self.trainer))

    def _subset(self, target: np.ndarray, whole: np.ndarray) -> np.ndarray:
        """The positions in ``target`` to train on; ``whole`` counts each class in the full training array."""
        generator = numpy_generator(self.seed, "train_subset")
        count = np.bincount(target, minlength=self.num_classes)
        wanted = np.where(whole > 0, self.train_per_class or 1, 0)
        if (count < wanted).any():
            if self.fake:
                return np.arange(len(target))
            c = int((count < wanted).argmax())
            raise ValueError(
                f"train_per_class={self.train_per_class} is more than the {count[c]} samples of class {c} "
                f"({self.class_names[c]!r}): lower it, or val_fraction"
            )
        if self.train_per_class is not None:
            return take_per_class(target, wanted, generator)
        if self.train_fraction is None:
            return np.arange(len(target))
        chosen = take_fraction(target, self.num_classes, self.train_fraction, generator)
        absent = (np.bincount(target[chosen], minlength=self.num_classes) == 0) & (whole > 0)
        if absent.any():
            if self.fake:
                return np.arange(len(target))
            c = int(absent.argmax())
            raise ValueError(
                f"train_fraction={self.train_fraction} leaves class {c} ({self.class_names[c]!r}) without a sample: "
                "raise it, or use train_per_class"
            )
        return chosen

    @property
    def train_size(self) -> int:
        """Training samples in use."""
        self.setup()
        return len(self.train_indices)

    @property
    def val_size(self) -> int:
        """Validation samples."""
        self.setup()
        return len(self.val_indices)

    @property
    def test_size(self) -> int:
        """Test samples."""
        self.setup()
        return len(self.test_indices)

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
    ) -> BatchLoader:
        """A loader over any samples of a split, for this process. Making one is cheap, however often.

        ``Batch.image`` is a tensor, or with several ``views`` a tuple of them, each drawn on its own for each sample:

        - ``"plain"``: the image as an evaluation sees it;
        - ``"weak"``: the augmentation and the cutout of this module;
        - ``"strong"``: AutoAugment, then the augmentation of this module, then a cutout of half the shorter side. (With
          ``ImageFolderDataModule``, the augmentation of the module, then AutoAugment, on the small image.)

        ``Batch.extras`` holds ``clean_target`` (int64 ``[B]``) for samples of the training array where ``noise`` is
        given.

        Args:
            split: ``"train"``, ``"val"`` or ``"test"``.
            indices: positions in the full array of the split (``"val"``: in the array it is taken from, mostly the
                training one); by default those in use.
            shuffle: a new order each epoch, and the training rule for the last batch.
            augment: a weak view rather than a plain one; of no account where ``views`` is given.
            batch_size: samples a batch and process; by default ``batch_size`` with ``shuffle``, else
                ``eval_batch_size``.
            views: names of the views; a sequence gives a tuple of tensors, a name alone one tensor.
            stream: a name; each gives another order and other views from the same seed.
            drop_last: with ``shuffle``, leave out a last batch that is smaller than the others, unless it is the only
                one.

        Raises:
            ValueError: for an unknown split or view, indices out of range, and strong views of features.
        """
        self.setup()
        if split not in ("train", "val", "test"):
            raise ValueError(f"split must be 'train', 'val' or 'test', got {split!r}: give one of them")
        if views is None:
            views = "weak" if augment else "plain"
        check_views(views, self.input_shape)
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
        )
        return self._make_loader(source, sampler, views)

    def _make_loader(self, source: str, sampler: ShardedSampler, views: str | Sequence[str]) -> BatchLoader:
        image, device = getattr(self, f"{source}_image"), self._process()[2]
        stored = self._stored.get(source)
        if stored is None or stored.source is not image or stored.device != device:
            stored = self._stored[source] = StoredImages(image, device)
        return ResidentLoader(
            stored,
            getattr(self, f"{source}_target"),
            sampler,
            Normalize(self.mean, self.std, self.input_shape, 255.0 if image.dtype == torch.uint8 else 1.0),
            augment=self.crop_flip,
            cutout=self.cutout,
            views=views,
            policy=BatchedAutoAugment(self.strong_policy),
            extras=self._extras(source),
        )

    def _extras(self, source: str) -> dict[str, Tensor]:
        """What else is known about each sample of a full array."""
        return {"clean_target": self.train_clean} if source == "train" and self.train_clean is not None else {}

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
        return self.loader("test")


def train_loader_of(data: Any) -> Any:
    """What the task that ``data`` is fitted with asks for, and without one all training samples, augmented."""
    task: Any = getattr(data.trainer, "lightning_module", None)
    if task is None:
        return data.loader("train", shuffle=True, augment=True)
    # a task that is not one of ours gets what ours get by default
    return task.train_loader(data) if hasattr(task, "train_loader") else Task.train_loader(task, data)


def check_at_least(name: str, value: int, least: int) -> None:
    """Raise a ``ValueError`` where ``value`` is below ``least``."""
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}: give a whole number from {least} on")
