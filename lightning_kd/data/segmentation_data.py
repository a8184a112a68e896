"""The base class of data modules that read images and masks from files."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.problems import Segmentation
from lightning_kd.core.seeding import numpy_generator
from lightning_kd.data.array_files import Arrays
from lightning_kd.data.augment import Normalize
from lightning_kd.data.fake_data import fake_mask_arrays
from lightning_kd.data.image_check import check_images
from lightning_kd.data.image_files import images_below
from lightning_kd.data.joint_views import JointViews, MaskedImages, PairFiles, PairTensors, check_sides, unlike
from lightning_kd.data.labelled_data import LabelledDataModule
from lightning_kd.data.mask_files import MaskTable, picture_size
from lightning_kd.data.new_samples import files_to_predict
from lightning_kd.data.sampling import BatchLoader, ShardedSampler
from lightning_kd.data.split_files import SPLITS_OF
from lightning_kd.data.splits import take_fraction, without
from lightning_kd.data.streaming import StreamingLoader

__all__ = ["SegmentationFilesDataModule"]

# by default samples stay in memory if they take at most this many bytes
RESIDENT_BYTES = 2**30

Pairs = tuple[list[str], list[str]]


class SegmentationFilesDataModule(LabelledDataModule):
    """Images and masks from files. Subclasses find the files and define the meaning of mask values.

    Training images are scaled, cropped, flipped and changed in colour together with their masks (``JointViews``); the
    random numbers of an image depend only on (seed, epoch, pass, index), not on workers, processes or memory.
    Evaluation uses whole images. Where samples stay in memory, ``train_image`` and so on are uint8 ``[N, 3, H, W]`` and
    ``train_target`` int16 ``[N, H, W]``; else ``train_image`` are paths, and ``train_target`` the sizes in bytes of the
    mask files, by which a checkpoint recognises its data. ``train_paths`` and ``train_masks`` are the files. For
    several processes see ``LabelledDataModule``; each process keeps all samples that stay in memory.

    Args:
        class_names: a name for each class.
        table: the meaning of mask values.
        image_size: height and width that images and masks are first resized to. Default: no resizing.
        crop_size: height and width of training crops. Default: those of the first image.
        scale: smallest and largest scaling factor of training images.
        scale_step: distance between the possible factors, which are equally likely; ``None`` for a uniform factor.
        flip: flip half of the training images left-right.
        colour: brightness, contrast and saturation of training images are each multiplied by 1 plus a number in
            [-colour, colour].
        augment: apply these random views; else training images are prepared as evaluation images.
        batch_size: training images per step and process.
        eval_batch_size: largest number of images per evaluation step and process; 1 where their sizes differ.
        val_fraction: fraction of the training images that becomes the validation set, if the data has none.
        test_fraction: fraction of all images that becomes the test set, if the data has none; the same for every seed.
        train_fraction: fraction of the remaining training samples to train on, in (0, 1]. Default: all.
        num_workers: number of worker processes that read and augment images; 0 uses the training process.
        resident: keep all samples decoded in memory. Default: if they have one size and take less than 1 GiB.
        mean: mean of each channel (values from 0 to 1). Default: that of ImageNet, 0.485, 0.456, 0.406.
        std: standard deviation of each channel. Default: that of ImageNet, 0.229, 0.224, 0.225.
        seed: fixes the validation split and the training subset; together with ``seed_everything`` also the order of
            the batches and the augmentation.
        fake: use a small synthetic data set in memory instead.
        predict: images to predict instead of the test set, see ``files_to_predict``.

    Raises:
        ValueError: for an argument out of its range, and for files that are damaged or do not match.
        FileNotFoundError, PermissionError: where a file or folder does not exist or may not be read.
    """

    root: str
    train_masks: list[str]

    def __init__(
        self,
        *,
        class_names: list[str],
        table: MaskTable,
        image_size: Sequence[int] | None = None,
        crop_size: Sequence[int] | None = None,
        scale: Sequence[float] = (0.5, 2.0),
        scale_step: float | None = 0.1,
        flip: bool = True,
        colour: float = 0.0,
        augment: bool = True,
        batch_size: int = 8,
        eval_batch_size: int = 8,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        train_fraction: float | None = None,
        num_workers: int = 0,
        resident: bool | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        seed: int = 0,
        fake: bool = False,
        predict: str | None = None,
    ) -> None:
        check_numbers(above=0, below=1, remedy="give a fraction", test_fraction=test_fraction)
        check_numbers(least=0, whole=True, num_workers=num_workers)
        for name, size in (("image_size", image_size), ("crop_size", crop_size)):
            check_sides(**({} if size is None else {name: size}))
        self.table = table
        self.image_size = None if image_size is None else (image_size[0], image_size[1])
        self.test_fraction = test_fraction
        self.num_workers = num_workers
        self.resident = resident
        self.augment = augment
        self.fake, self.predict = fake, predict
        self._sizes: dict[str, set[tuple[int, int]]] = {}  # image sizes of each split that was checked
        height, width = self.image_size or self._first_size(crop_size)
        self.crop_size = (height, width) if crop_size is None else (crop_size[0], crop_size[1])
        self.views = JointViews(self.crop_size, scale, scale_step, flip, colour)
        super().__init__(
            class_names=class_names,
            input_shape=(3, height, width),
            mean=[0.485, 0.456, 0.406] if mean is None else mean,
            std=[0.229, 0.224, 0.225] if std is None else std,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            val_fraction=val_fraction,
            train_fraction=train_fraction,
            seed=seed,
            fake=fake,
            problem=Segmentation(len(class_names)),
            predict=predict,
        )
        self._paths: dict[str, list[str]] = {}

    @abstractmethod
    def find_pairs(self, split: str) -> Pairs | None:
        """Image and mask files of ``"train"``, ``"val"`` or ``"test"``; ``None`` where there is no such split.

        Without ``"test"`` the test set is ``"val"``; without both it is a random part of ``"train"``.
        """

    @abstractmethod
    def image_folder(self) -> Path:
        """The folder of the training images."""

    def _first_size(self, crop_size: Sequence[int] | None) -> tuple[int, int]:
        """Height and width of the first image, for ``input_shape``."""
        if self.predict is not None:
            return picture_size(files_to_predict(self.predict)[0])
        if (folder := self.image_folder()).is_dir() and (found := images_below(folder)):
            return picture_size(found[0])
        if not self.fake:
            self.find_pairs("train")  # raises an error that names what is missing
        height, width = crop_size or (64, 96)
        return height, width

    # -- reading -----------------------------------------------------------------------------------------------------

    def fake_arrays(self) -> Arrays:
        return fake_mask_arrays((3, *self.crop_size), self.num_classes)

    def load_arrays(self) -> Arrays:
        pairs = {split: self.find_pairs(split) for split in ("train", "val", "test")}
        train, val, test = (pairs[split] for split in ("train", "val", "test"))
        assert train is not None
        if test is None and val is not None:
            test, val = val, None
        elif test is None:
            train, test = self._drawn_test(train)
        assert test is not None
        parts = {"train": train, "test": test, **({} if val is None else {"val": val})}
        self._paths = {name: images for name, (images, _) in parts.items()}
        for name, (images, masks) in parts.items():
            setattr(self, f"{name}_paths", images)
            setattr(self, f"{name}_masks", masks)
        made = {name: self._array(*pair) for name, pair in parts.items()} if self._stay(parts) else {}
        sizes = {name: torch.tensor([os.stat(path).st_size for path in masks]) for name, (_, masks) in parts.items()}
        arrays = {name: made.get(name) or (images, sizes[name]) for name, (images, _) in parts.items()}
        return Arrays(*arrays["train"], *arrays["test"], *arrays.get("val", ()))

    def _drawn_test(self, train: Pairs) -> tuple[Pairs, Pairs]:
        images, masks = train
        generator = numpy_generator(0, "test_split")  # does not use self.seed: all runs have the same test images
        chosen = take_fraction(np.zeros(len(images), dtype=np.int64), 1, self.test_fraction, generator, leave=1)
        if not len(chosen):
            raise ValueError(
                f"test_fraction={self.test_fraction} of {len(images)} images leaves the test split empty: raise it"
            )
        rest = without(len(images), chosen)
        drawn, left = (([images[i] for i in some], [masks[i] for i in some]) for some in (chosen, rest))
        return left, drawn

    def _stay(self, parts: dict[str, Pairs]) -> bool:
        if self.resident is not None:
            return self.resident
        images = [path for paths, _ in parts.values() for path in paths]
        height, width = self.image_size or picture_size(images[0])
        small = 5 * height * width * len(images) <= RESIDENT_BYTES
        return small and (self.image_size is not None or all(picture_size(one) == (height, width) for one in images))

    def _array(self, images: list[str], masks: list[str]) -> tuple[Tensor, Tensor]:
        files = PairFiles(images, masks, self.table, self.image_size)
        first = files[0]
        image = torch.empty(len(images), *first[0].shape, dtype=torch.uint8)
        target = torch.empty(len(images), *first[1].shape, dtype=torch.int16)
        for k in range(len(images)):
            one, mask = files[k]
            if one.shape != image.shape[1:]:
                raise ValueError(
                    f"resident needs images of one size, got {tuple(one.shape[1:])} in {images[k]!r} after "
                    f"{tuple(image.shape[2:])}: give image_size, or resident: false"
                )
            image[k], target[k] = one, mask
        return image, target

    def describe(self) -> dict[str, Any]:
        """As ``LabelledDataModule.describe``, saying that images are resized without keeping the aspect ratio."""
        return super().describe() | {"stretch": True}

    def load_new(self) -> list[str]:
        return files_to_predict(str(self.predict))

    def path_of(self, index: int) -> str | None:
        self.setup("predict")
        if self.predict is not None:
            return super().path_of(index)
        return self._paths["test"][index] if "test" in self._paths else None

    # -- checking the files ------------------------------------------------------------------------------------------

    def setup(self, stage: str | None = None) -> None:
        """Load and split the data, once, and check the files of the splits that the stage uses."""
        super().setup(stage)
        if self.trainer is not None:  # without one files are checked when they are read
            self.check_files(*(("predict",) if self._only_new(stage) else SPLITS_OF.get(stage or "", ())))
            if stage == "fit" and not self.fake:
                some = self.train_indices[:: len(self.train_indices) // 16 + 1].tolist()
                kept = isinstance(self.train_image, Tensor)
                masks = (self.train_target[k] if kept else self.table.read(self.train_masks[k]) for k in some)
                self.table.tell_of_one_class(masks, self.class_names)

    def check_files(self, *splits: str) -> None:
        """Check the files of some splits, once: that they can be read, and that images and masks match.

        Raises:
            ValueError: where they do not, or images of different sizes would be in one batch.
        """
        for split in splits:
            image = self._of(split, "image")
            if self.trainer is None or split in self._sizes or isinstance(image, Tensor):
                continue
            chosen = getattr(self, f"{split}_indices").tolist()
            images = [image[i] for i in chosen]
            masks = [] if split == "predict" else [self._of(split, "masks")[i] for i in chosen]
            root = str(self.predict) if split == "predict" else self.root
            check_images([*images, *masks], root, "raise", trainer=self.trainer)
            sizes = [picture_size(path) for path in images]
            for one, mask, size in zip(images, masks, sizes, strict=False):
                if (other := picture_size(mask, turned=False)) != size:
                    raise ValueError(unlike(one, mask, size, other))
            self._sizes[split] = {*sizes} if self.image_size is None else {self.image_size}
        for split in splits:
            whole = split != "train" or not self.augment
            most = self.batch_size if split == "train" else self.eval_batch_size
            if whole and most > 1 and len(sizes_of := self._sizes.get(split, ())) > 1:
                name = "batch_size" if split == "train" else "eval_batch_size"
                some = ", ".join(f"{h} x {w}" for h, w in sorted(sizes_of)[:3])
                raise ValueError(
                    f"{name}={most} cannot hold images of different sizes, got {some} in split {split!r}: give {name} "
                    "1, or image_size"
                )

    def _of(self, split: str, what: str) -> Any:
        return getattr(self, f"{self._val_source if split == 'val' else split}_{what}")

    # -- loaders -----------------------------------------------------------------------------------------------------

    def _make_loader(self, source: str, sampler: ShardedSampler, views: str | Sequence[str]) -> BatchLoader:
        image = getattr(self, f"{source}_image")
        pairs: PairFiles | PairTensors
        if isinstance(image, Tensor):
            pairs = PairTensors(image, getattr(self, f"{source}_target"))
        else:
            masks = getattr(self, f"{source}_masks", None)
            pairs = PairFiles(image, masks, self.table, self.image_size)
        weak = self.augment and "weak" in views
        normalize = Normalize(self.mean, self.std, self.input_shape)
        return StreamingLoader(
            MaskedImages(pairs, normalize, sampler.seed, self.views if weak else None),
            sampler,
            num_workers=self.num_workers,
            pin_memory=self._process()[2].type == "cuda",
            extras=self._extras(source),
        )
