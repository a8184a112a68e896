"""The base of the data modules: splits, subsets and loaders over labelled data in memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.problems import Problem, SingleLabel
from lightning_kd.core.seeding import numpy_generator
from lightning_kd.data.arguments import check_class_names, check_shares, check_statistics
from lightning_kd.data.array_files import Arrays
from lightning_kd.data.augment import CropFlip
from lightning_kd.data.data_digest import data_digest
from lightning_kd.data.fake_data import fake_arrays
from lightning_kd.data.image_files import read_image
from lightning_kd.data.resident import StoredImages
from lightning_kd.data.split_loaders import SplitLoaders
from lightning_kd.data.splits import take_fraction, take_training_samples, without


class LabelledDataModule(SplitLoaders, ABC):
    """Splits, subsets and loaders over labelled data in memory, of any kind of problem.

    Subclasses say where it comes from.

    A subclass implements ``load_arrays`` (and ``prepare_data`` where files have to be fetched) and hands the rest to
    ``super().__init__``. All arguments are plain attributes. ``problem``, ``num_classes``, ``input_shape``,
    ``class_names``, ``mean`` and ``std`` can be read at once; the sizes load the data when they are first read.

    After ``setup``: ``train_image``, ``train_target``, ``test_image`` and ``test_target`` are the full arrays (images
    uint8 ``[N, C, H, W]``, features float32 ``[N, D]``, targets as the problem has them, masks int16), and
    ``train_indices``, ``val_indices`` and ``test_indices`` (int64 arrays, ascending) the positions in them that are
    used. Validation samples come out of the training array, unless the data set has its own ``val_image`` and
    ``val_target``. Splits are stratified by class where each sample has one class.

    Loaders yield ``Batch`` with ``index`` the position in the full array. With ``val_fraction=0`` there is no
    validation loader, so that nothing is selected on the test set. The prediction set is the test set, or with
    ``predict`` the new samples there, without labels (their targets are -1); then nothing else is loaded for it.

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
        val_fraction: the share of the training samples that becomes the validation set, 0 to below 1; of each class
            alike where each sample has one class.
        train_fraction: likewise the share of what is then left to train on, above 0 to 1.
        train_per_class: train on this many samples of each class instead; only with one class a sample.
        crop_flip: the random view of each training image; ``None`` for none.
        cutout: the side in pixels of a box set to the mean colour in each training image; 0 is off.
        seed: fixes the validation split and the subset, for the same given labels (both are stratified by them);
            together with ``seed_everything`` also the order of the batches and the augmentation; 0 or more.
        fake: use a small made-up data set of the same shape and classes, without any file; all of it, where it is too
            small for the subset asked for.
        problem: what is asked of a network. Default: one class a sample.
        predict: where the samples to predict are, which have no labels. Default: the test set is predicted.
        balance: show each class equally often, see ``ArrayDataModule``; only with one class a sample.

    Raises:
        ValueError: for an argument out of its range, and for both ``train_fraction`` and ``train_per_class``.
    """

    train_image: Any
    train_target: Tensor
    val_image: Any
    val_target: Tensor
    test_image: Any
    test_target: Tensor
    predict_image: Any
    predict_target: Tensor
    predict_indices: np.ndarray
    train_indices: np.ndarray
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
        problem: Problem | None = None,
        predict: str | None = None,
        balance: bool = False,
    ) -> None:
        super().__init__()
        check_numbers(least=1, whole=True, batch_size=batch_size, eval_batch_size=eval_batch_size)
        check_numbers(least=0, whole=True, cutout=cutout, seed=seed)
        check_shares(val_fraction, train_fraction, train_per_class)
        check_statistics(mean, std, input_shape)
        self.problem = SingleLabel(len(class_names)) if problem is None else problem
        if train_per_class is not None and not self.problem.one_class:
            raise ValueError(
                f"train_per_class={train_per_class} is for one class a sample, the data has {self.problem.kind}: use "
                "train_fraction"
            )
        if balance and not self.problem.one_class:
            raise ValueError(f"balance is for one class a sample, the data has {self.problem.kind}: leave it out")
        self.balance = balance
        self.num_classes = self.problem.num_classes
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
        self.predict = predict
        self._val_source = "train"
        self._ready = self._new_ready = False
        self._stored: dict[str, StoredImages] = {}
        self._digest: str | None = None

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
        """Load and split the data, once; to predict new samples, load those alone."""
        if not self._only_new(stage) and not self._ready:
            self._load()

    def load_new(self) -> Any:
        """The samples of ``predict``: files, or a tensor like ``test_image``. Called once, in every process."""
        raise ValueError(f"{type(self).__name__} cannot read predict={self.predict!r}: leave it out")

    def _only_new(self, stage: str | None) -> bool:
        """Whether the new samples are all that is asked for; they are there then."""
        if stage != "predict" or self.predict is None:
            return False
        if not self._new_ready:
            self.predict_image = self.load_new()
            self.predict_target = torch.full((len(self.predict_image),), -1)
            self.predict_indices = np.arange(len(self.predict_image))
            self._new_ready = True
        return True

    def describe(self) -> dict[str, Any]:
        """What a prediction has to know of the data, in plain values. Checkpoints hold it as ``data_description``."""
        return {
            "problem": type(self.problem).__name__,
            "class_names": list(self.class_names),
            "input_shape": list(self.input_shape),
            "mean": list(self.mean),
            "std": list(self.std),
        }

    def check_classes(self, stored: Sequence[str]) -> None:
        """Asked before a checkpoint of other data is loaded, whose class names are ``stored``.

        Raises:
            ValueError: where they differ from those here, or stand in another order.
        """
        check_class_names(stored, self.class_names)

    def state_dict(self) -> dict[str, Any]:
        """For checkpoints: what a memory of each sample hangs on."""
        if not self._ready:
            return {}
        if self._digest is None:
            self._digest = data_digest(self.train_image, self.train_target, self.train_indices)
        return {"data_sha256": self._digest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Before a fit goes on from a checkpoint.

        Raises:
            ValueError: where that was trained on other samples or labels, or in another order.
        """
        fitting = self.trainer is not None and self.trainer.state.fn == "fit"
        stored = state_dict.get("data_sha256")
        if fitting and stored is not None and stored != self.state_dict().get("data_sha256"):
            raise ValueError(
                f"the checkpoint was trained on other data than {type(self).__name__} has now (other samples, another "
                "order, or other labels): give it those, or start anew with --overwrite in place of --ckpt_path"
            )

    def path_of(self, index: int) -> str | None:
        """The image file of a sample of the prediction set, by its position in the full array; ``None`` for arrays."""
        image = self._predicted()
        return image[index] if isinstance(image, list) else None

    def picture_of(self, index: int) -> Image.Image | None:
        """A sample of the prediction set, as ``picture`` has those of the training set."""
        return self._shown(self._predicted()[index])

    def _predicted(self) -> Any:
        """The full array of the prediction set."""
        self.setup("predict")
        return self.test_image if self.predict is None else self.predict_image

    def picture(self, index: int) -> Image.Image | None:
        """The training sample at a position of the full array as a person sees it, grey or RGB in 8 bits and without
        augmentation; ``None`` for features."""
        self.setup()
        return self._shown(self.train_image[index])

    def _shown(self, image: Any) -> Image.Image | None:
        if isinstance(image, str):
            return read_image(image)
        if image.ndim != 3:
            return None
        shown = image[: 3 if len(image) >= 3 else 1].permute(1, 2, 0).contiguous()  # of other channels nothing is known
        return Image.fromarray((shown if shown.shape[2] == 3 else shown[..., 0]).numpy())

    def _classes(self, target: Tensor) -> tuple[np.ndarray, int]:
        """What splits are stratified by, int64 ``[N]``, and how many classes of it there are."""
        if self.problem.one_class:
            return target.numpy(), self.num_classes
        return np.zeros(len(target), dtype=np.int64), 1

    def _change_targets(self) -> None:
        """Called once the arrays are read, before anything is split."""

    def _load(self) -> None:
        self._ready, self._digest = False, None  # until all of it has worked
        arrays = self.fake_arrays() if self.fake else self.load_arrays()
        self.train_image, self.train_target, self.test_image, self.test_target, val_image, val_target = arrays
        self._change_targets()
        self.test_indices = np.arange(len(self.test_target))
        target, classes = self._classes(self.train_target)
        if val_target is not None:
            self.val_image, self.val_target, self._val_source = val_image, val_target, "val"
            self.val_indices, rest = np.arange(len(val_target)), np.arange(len(target))
        else:
            generator = numpy_generator(self.seed, "val_split")
            self.val_indices = take_fraction(target, classes, self.val_fraction, generator, leave=1)
            if self.val_fraction and not len(self.val_indices):
                raise ValueError(
                    f"val_fraction={self.val_fraction} of {len(target)} samples leaves the validation split empty: "
                    "raise it, or give 0 for no validation"
                )
            rest = without(len(target), self.val_indices)
        self.train_indices = rest[
            take_training_samples(
                target[rest],
                np.bincount(target, minlength=classes),
                numpy_generator(self.seed, "train_subset"),
                self.class_names,
                per_class=self.train_per_class,
                fraction=self.train_fraction,
                all_if_too_few=self.fake,
                by_class=self.problem.one_class,
            )
        ]
        self._ready = True

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
