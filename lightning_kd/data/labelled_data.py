"""The base class of data modules: splits, subsets and loaders of labelled data."""

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
from lightning_kd.data.arguments import check_class_names, check_statistics, check_subset_sizes
from lightning_kd.data.array_files import Arrays
from lightning_kd.data.augment import CropFlip
from lightning_kd.data.data_digest import data_digest
from lightning_kd.data.fake_data import fake_arrays
from lightning_kd.data.image_files import read_image
from lightning_kd.data.resident import StoredImages
from lightning_kd.data.split_loaders import SplitLoaders
from lightning_kd.data.splits import take_fraction, take_training_samples, without


class LabelledDataModule(SplitLoaders, ABC):
    """Splits, subsets and loaders of labelled data for any kind of problem.

    A subclass implements ``load_arrays`` (and ``prepare_data`` to download files) and passes all other arguments to
    ``super().__init__``. Arguments are plain attributes. ``problem``, ``num_classes``, ``input_shape``,
    ``class_names``, ``mean`` and ``std`` can be read before ``setup``; reading a size loads the data.

    After ``setup``, ``train_image``, ``train_target``, ``test_image`` and ``test_target`` are the full arrays (images
    uint8 ``[N, C, H, W]``, features float32 ``[N, D]``, targets as the problem defines them, masks int16), and
    ``train_indices``, ``val_indices`` and ``test_indices`` (int64, ascending) the positions in them that are used.
    Validation samples are split off the training array, unless the data set has its own ``val_image`` and
    ``val_target``. Splits are stratified by class where each sample has one class.

    Loaders yield ``Batch``, with ``index`` the position in the full array. With ``val_fraction=0`` there is no
    validation loader, so no model is selected on the test set. The prediction set is the test set or, with ``predict``,
    the new samples there, with target -1; for the stage ``"predict"`` only these are loaded.

    With several processes, only one prepares files. Each rank reads its part of every batch and Lightning adds no
    sampler; ``batch_size`` is per process, and together the ranks see the batches of one process with ``world_size``
    times that size (see ``ShardedSampler``). No sample is evaluated twice.

    Args:
        class_names: a name for each class; their number is ``num_classes``.
        input_shape: ``(C, H, W)``, or ``(D,)`` for features.
        mean: mean of each channel (or feature), in units of the full scale, to normalise samples.
        std: standard deviation of each channel (or feature), in the same units.
        batch_size: training samples per step and process.
        eval_batch_size: largest number of samples per evaluation step and process.
        val_fraction: fraction of the training samples that becomes the validation set, in [0, 1); stratified by class
            where each sample has one class.
        train_fraction: fraction of the remaining samples to train on, in (0, 1]; stratified likewise.
        train_per_class: number of samples of each class to train on, instead of ``train_fraction``; only with one class
            per sample.
        crop_flip: random crop and flip of training images; ``None`` for none.
        cutout: side in pixels of a square set to the mean colour in each training image; 0 is off.
        seed: fixes the validation split and the training subset, both stratified by the given labels; together with
            ``seed_everything`` also the order of the batches and the augmentation; 0 or more.
        fake: use a small synthetic data set of the same shape and classes, without any file, also for
            ``unlabelled``; all of it, where it is too small for the subset asked for.
        problem: the kind of problem. Default: one class per sample.
        predict: where to find samples to predict, without labels. Default: the test set is predicted.
        balance: draw each class equally often, see ``ArrayDataModule``; only with one class per sample.

    Raises:
        ValueError: for an argument out of its range, or both ``train_fraction`` and ``train_per_class``.
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
        check_subset_sizes(val_fraction, train_fraction, train_per_class)
        check_statistics(mean, std, input_shape)
        self.problem = SingleLabel(len(class_names)) if problem is None else problem
        if train_per_class is not None and not self.problem.one_class:
            raise ValueError(
                f"train_per_class={train_per_class} is for one class per sample, the data has {self.problem.kind}: use "
                "train_fraction"
            )
        if balance and not self.problem.one_class:
            raise ValueError(f"balance is for one class per sample, the data has {self.problem.kind}: leave it out")
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
        """Read and check the whole data set. Called once in every process, and not with ``fake``."""

    def fake_arrays(self) -> Arrays:
        """The synthetic data set that is used with ``fake``."""
        return fake_arrays(self.input_shape, self.num_classes)

    def setup(self, stage: str | None = None) -> None:
        """Load and split the data, once; for the stage ``"predict"`` with ``predict``, load the new samples only."""
        if not self._only_new(stage) and not self._ready:
            self._load()

    def load_new(self) -> Any:
        """Read the samples of ``predict``: files, or a tensor like ``test_image``; called once per process."""
        raise ValueError(f"{type(self).__name__} cannot read predict={self.predict!r}: leave it out")

    def _only_new(self, stage: str | None) -> bool:
        """Whether the stage needs only the samples of ``predict``; if so, load them."""
        if stage != "predict" or self.predict is None:
            return False
        if not self._new_ready:
            self.predict_image = self.load_new()
            self.predict_target = torch.full((len(self.predict_image),), -1)
            self.predict_indices = np.arange(len(self.predict_image))
            self._new_ready = True
        return True

    def describe(self) -> dict[str, Any]:
        """What a prediction needs to know of the data, as plain values. Checkpoints hold it as ``data_description``."""
        return {
            "problem": type(self.problem).__name__,
            "class_names": list(self.class_names),
            "input_shape": list(self.input_shape),
            "mean": list(self.mean),
            "std": list(self.std),
        }

    def check_classes(self, stored: Sequence[str]) -> None:
        """Check the class names ``stored`` in a checkpoint, before it is used with this data.

        Raises:
            ValueError: where they differ from those of this data, or their order does.
        """
        check_class_names(stored, self.class_names)

    def state_dict(self) -> dict[str, Any]:
        """State for checkpoints: a digest of the samples, their order and their labels, see ``data_digest``."""
        if not self._ready:
            return {}
        if self._digest is None:
            self._digest = data_digest(self.train_image, self.train_target, self.train_indices)
        return {"data_sha256": self._digest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check, before a fit resumes, that the checkpoint was trained on this data.

        Raises:
            ValueError: where it was trained on other samples or labels, or in another order.
        """
        fitting = self.trainer is not None and self.trainer.state.fn == "fit"
        stored = state_dict.get("data_sha256")
        if fitting and stored is not None and stored != self.state_dict().get("data_sha256"):
            raise ValueError(
                f"the checkpoint was trained on other data than {type(self).__name__} has now (other samples, another "
                "order, or other labels): give the same data, or start anew with --overwrite instead of --ckpt_path"
            )

    def path_of(self, index: int) -> str | None:
        """The image file of a sample of the prediction set, by its position in the full array; ``None`` for arrays."""
        image = self._predicted()
        return image[index] if isinstance(image, list) else None

    def picture_of(self, index: int) -> Image.Image | None:
        """A sample of the prediction set as an image for display, as ``picture`` returns those of the training set."""
        return self._shown(self._predicted()[index])

    def _predicted(self) -> Any:
        """The full array of the prediction set."""
        self.setup("predict")
        return self.test_image if self.predict is None else self.predict_image

    def picture(self, index: int) -> Image.Image | None:
        """A training sample as an image for display, 8-bit grey or RGB without augmentation; ``None`` for features."""
        self.setup()
        return self._shown(self.train_image[index])

    def _shown(self, image: Any) -> Image.Image | None:
        if isinstance(image, str):
            return read_image(image)
        if image.ndim != 3:
            return None
        shown = image[: 3 if len(image) >= 3 else 1].permute(1, 2, 0).contiguous()  # shows 3 or 1 channels
        return Image.fromarray((shown if shown.shape[2] == 3 else shown[..., 0]).numpy())

    def _classes(self, target: Tensor) -> tuple[np.ndarray, int]:
        """The classes that splits are stratified by, int64 ``[N]``, and their number."""
        if self.problem.one_class:
            return target.numpy(), self.num_classes
        return np.zeros(len(target), dtype=np.int64), 1

    def _change_targets(self) -> None:
        """A hook for subclasses, called after the arrays are read and before they are split."""

    def _load(self) -> None:
        self._ready, self._digest = False, None  # stay so if a step below fails
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
        """Number of training samples in use."""
        self.setup()
        return len(self.train_indices)

    @property
    def val_size(self) -> int:
        """Number of validation samples."""
        self.setup()
        return len(self.val_indices)

    @property
    def test_size(self) -> int:
        """Number of test samples."""
        self.setup()
        return len(self.test_indices)
