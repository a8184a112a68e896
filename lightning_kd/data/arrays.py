"""Data module for your own arrays: an .npz file, or a pair of .npy files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.problems import MultiLabel, Problem, Segmentation, SingleLabel
from lightning_kd.core.seeding import numpy_generator
from lightning_kd.data.arguments import names_of
from lightning_kd.data.array_files import (
    Arrays,
    check_keys,
    image_statistics,
    number_classes,
    read_arrays,
    to_feature,
    to_image,
    to_label_matrix,
    to_masks,
    to_target,
)
from lightning_kd.data.augment import CropFlip
from lightning_kd.data.candidate_sets import CandidateSets
from lightning_kd.data.crowd_labels import CrowdLabels
from lightning_kd.data.fake_data import fake_arrays, fake_label_arrays, fake_mask_arrays
from lightning_kd.data.label_noise import LabelNoise
from lightning_kd.data.multi_label_data import MultiLabelDataModule
from lightning_kd.data.new_samples import read_unlabelled
from lightning_kd.data.splits import take_fraction, without
from lightning_kd.data.weak_labels import CandidateLabels, SinglePositive

_PROBLEMS: dict[str, type[Problem]] = {
    "single_label": SingleLabel,
    "multi_label": MultiLabel,
    "segmentation": Segmentation,
}
_FAKE = {"single_label": fake_arrays, "multi_label": fake_label_arrays, "segmentation": fake_mask_arrays}


class ArrayDataModule(MultiLabelDataModule):
    """Your own images or features, from one ``.npz``, or from a ``.npy`` of samples with one of targets.

    An ``.npz`` holds ``train_image`` and ``train_target``, and ``test_image`` and ``test_target`` if there is a test
    set; or ``image`` and ``target``. Without a test set, ``test_fraction`` of each class becomes it, the same samples
    for every ``seed``. Samples are uint8 images ``[N, H, W, C]`` or ``[N, H, W]``, or float features ``[N, D]``, for
    which names may have ``feature`` instead of ``image``. Other arrays are ignored. Targets may be

    - integers ``[N]`` (or ``[N, 1]``) from 0 on, booleans, or strings, the class names: one class per sample
      (``SingleLabel``). Integers from 1 on, or with large gaps, are renumbered; the old numbers become class names;
    - uint8 ``[N, C]`` of 0, 1 and 255 (unknown): several labels per sample (``MultiLabel``);
    - uint8 ``[N, H, W]`` (or ``[N, H, W, 1]``) with 255 for ignored pixels: a class for each pixel (``Segmentation``).
      Masks are cropped and flipped with their images.

    The file is read when the object is created, and all samples stay in memory. See ``ClassificationDataModule``
    for attributes, loaders and use with several processes.

    Args:
        path: the ``.npz`` file, or the ``.npy`` file of the samples. With ``fake`` it need not exist.
        target_path: the ``.npy`` file of the targets, if ``path`` is a ``.npy``.
        class_names: a name for each class. Default: their numbers, up to the largest training target or one per column
            of the targets. Names that are whole numbers other than 0 to C - 1 are looked up for integer targets, so a
            file that lacks some classes of another file can be given that file's ``class_names``.
        batch_size: training samples per step and process.
        eval_batch_size: largest number of samples per evaluation step and process.
        val_fraction: fraction of the training samples that becomes the validation set, in [0, 1). All fractions are
            stratified by class where each sample has one class.
        test_fraction: fraction that becomes the test set where the file has none, in (0, 1).
        train_fraction: fraction of the remaining training samples to train on, in (0, 1]. Default: all.
        train_per_class: number of samples of each class to train on, instead of ``train_fraction``; only with one class
            per sample.
        augment: random crops of training images padded with black, and left-right flips; not for features.
        crop_padding: width of that padding in pixels.
        flip: with ``augment``, flip half of the training images left-right.
        cutout: side in pixels of a square set to the mean colour at a random place in each training image; 0 is off.
        mean: mean of each channel (values from 0 to 1) or feature. Default: that of the training images; 0 for
            features.
        std: standard deviation of each channel or feature. Default: that of the training images; 1 for features.
        seed: fixes the validation split and the training subset, which are stratified by the given labels; together
            with ``seed_everything`` also the order of the batches and the augmentation.
        fake: use a small synthetic data set instead, shaped like the file if there is one, else 32 x 32 colour images
            of 10 classes.
        noise: label noise for the training samples, see ``LabelNoise``; only with one class per sample. Default: none.
        kind: ``"single_label"``, ``"multi_label"`` or ``"segmentation"``. Default: told by the shape of the targets;
            with ``fake`` and no file ``"single_label"``.
        predict: samples to predict instead of the test set, without labels: a ``.npy``, or an ``.npz`` with ``image``
            or ``feature``. ``path`` need not exist then, if ``class_names``, ``mean``, ``std`` (and a ``kind`` other
            than the first) are given; ``lightning-kd predict`` takes them from the checkpoint.
        balance: draw each class equally often in training. The epoch keeps its length: samples of rare classes are
            repeated (with new augmentation each time), some of frequent classes wait for later epochs.
        candidates: with several labels per sample, see ``MultiLabelDataModule``; with one class, candidate sets of
            which one label is true, see ``UniformCandidates``.
        single_positive: see ``MultiLabelDataModule``.
        labelled_fraction: see ``MultiLabelDataModule``.
        labelled_seed: see ``MultiLabelDataModule``.
        normalize: see ``MultiLabelDataModule``; for every ``kind``.
        n_grid: see ``MultiLabelDataModule``.
        meta_per_class: number of training samples of each class to hold out with their true labels, for candidate
            methods.
        annotations: gives the training samples labels by several annotators, see ``AnnotatedDataModule``.
        unlabelled: further training samples without labels, or ``"rest"``, see ``ClassificationDataModule``.

    Raises:
        ValueError: for an argument out of its range, and for arrays that are damaged or do not match.
        FileNotFoundError: where a file does not exist.
    """

    def __init__(
        self,
        path: str,
        target_path: str | None = None,
        class_names: Sequence[str | int] | None = None,
        batch_size: int = 64,
        eval_batch_size: int = 256,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        train_fraction: float | None = None,
        train_per_class: int | None = None,
        augment: bool = False,
        crop_padding: int = 4,
        flip: bool = True,
        cutout: int = 0,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        seed: int = 0,
        fake: bool = False,
        noise: LabelNoise | None = None,
        kind: Literal["single_label", "multi_label", "segmentation"] | None = None,
        predict: str | None = None,
        balance: bool = False,
        candidates: CandidateLabels | CandidateSets | None = None,
        single_positive: SinglePositive | None = None,
        labelled_fraction: float | None = None,
        labelled_seed: int = 1,
        normalize: bool = True,
        n_grid: int = 2,
        meta_per_class: int | None = None,
        annotations: CrowdLabels | None = None,
        unlabelled: str | None = None,
    ) -> None:
        check_numbers(above=0, below=1, remedy="give a fraction", test_fraction=test_fraction)
        check_numbers(least=0, whole=True, crop_padding=crop_padding)
        given = names_of(class_names)
        self.path, self.target_path, self.test_fraction = path, target_path, test_fraction
        if kind is not None and kind not in _PROBLEMS:
            raise ValueError(f"kind must be one of {', '.join(_PROBLEMS)}, or None, got {kind!r}: choose one")
        self.kind: str = kind or "single_label"
        self.predict = predict
        self._new: Tensor | None = None
        self._arrays: Arrays | None = None
        there = Path(path).exists()
        if predict is not None and given and mean and std and (kind or not there):
            names, shape = given, tuple(self.load_new().shape[1:])
            if len(mean) != shape[0]:
                raise ValueError(
                    f"samples of predict {predict!r} are of shape {shape}, and those trained on have {len(mean)} "
                    f"{'channels' if len(shape) == 3 else 'features'}: give samples like those"
                )
        elif fake and not there:
            names = given or [str(c) for c in range(10)]
            self._arrays = _FAKE[self.kind]((3, 32, 32), len(names))  # type: ignore[operator]
        else:
            names, self._arrays = self._read(given, kind)
            if fake:
                shape = tuple(self._arrays.train_image.shape[1:])
                self._arrays = _FAKE[self.kind](shape, len(names))  # type: ignore[operator, arg-type]
        if self._arrays is not None:
            shape = tuple(self._arrays.train_image.shape[1:])
        if len(shape) == 1 and (augment or cutout):
            raise ValueError(f"augment and cutout need images, got features of shape {shape}: leave them off")
        if self.kind == "segmentation" and cutout:
            raise ValueError(f"cutout={cutout} does not go with masks: leave it off")
        own: tuple[list[float], list[float]] = ([0.0] * shape[0], [1.0] * shape[0])
        if len(shape) == 3 and self._arrays is not None:
            own = image_statistics(self._arrays.train_image)
        super().__init__(
            class_names=names,
            input_shape=shape,
            mean=own[0] if mean is None else mean,
            std=own[1] if std is None else std,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            val_fraction=val_fraction,
            train_fraction=train_fraction,
            train_per_class=train_per_class,
            crop_flip=CropFlip(crop_padding, flip) if augment else None,
            cutout=cutout,
            seed=seed,
            fake=fake,
            noise=noise,
            annotations=annotations,
            balance=balance,
            problem=_PROBLEMS[self.kind](len(names)),
            predict=predict,
            candidates=candidates,
            single_positive=single_positive,
            labelled_fraction=labelled_fraction,
            labelled_seed=labelled_seed,
            normalize=normalize,
            n_grid=n_grid,
            meta_per_class=meta_per_class,
            unlabelled=unlabelled,
        )
        self.augment, self.crop_padding, self.flip = augment, crop_padding, flip

    def load_arrays(self) -> Arrays:
        if self._arrays is None:  # so far only the samples to predict were read
            self._arrays = self._read(self.class_names, self.kind)[1]
        return self._arrays

    def fake_arrays(self) -> Arrays:
        return self.load_arrays()

    def load_new(self) -> Tensor:
        if self._new is None:
            self._new = read_unlabelled(str(self.predict), "predict")
        own = None if self._arrays is None else self._arrays.train_image
        if own is not None and (own.shape[1:] != self._new.shape[1:] or own.dtype != self._new.dtype):
            raise ValueError(
                f"samples of predict {self.predict!r} must be like those trained on {tuple(own.shape[1:])}, got "
                f"{tuple(self._new.shape[1:])}: give both in one shape and dtype"
            )
        return self._new

    def describe(self) -> dict[str, Any]:
        """As ``LabelledDataModule.describe``, with the ``kind``."""
        return super().describe() | {"kind": self.kind}

    def _read(self, class_names: list[str] | None, kind: str | None) -> tuple[list[str], Arrays]:
        arrays = read_arrays(Path(self.path))
        if "" in arrays:
            if self.target_path is None:
                raise ValueError(f"target_path must go with the .npy file {self.path!r}, got None: give its targets")
            labels = read_arrays(Path(self.target_path), "target_path").get("", np.empty(0))
            arrays = {"image": arrays[""], "target": labels}
        prefix = "train_" if {"train_image", "train_feature", "train_target"} & set(arrays) else ""
        shape = arrays.get(f"{prefix}target", np.empty(0)).shape
        one_each = len(shape) == 2 and shape[1] == 1  # some libraries store one class per sample as [N, 1]
        guess = {2: "multi_label", 3: "segmentation", 4: "segmentation"}.get(len(shape), "single_label")
        self.kind = kind or ("single_label" if one_each else guess)
        if self.kind == "single_label":
            keys = [key for key in (f"{prefix}target", "test_target") if key in arrays]
            found, targets = number_classes([arrays[key] for key in keys], class_names, repr(self.path))
            arrays = {**arrays, **dict(zip(keys, targets, strict=True))}
        else:
            found = class_names
        image, target = self._pair(arrays, prefix, len(found) if found else None)
        count = target.shape[1] if self.kind == "multi_label" else int(target.max()) + 1
        names = found or [str(c) for c in range(count)]
        if not class_names and len(names) < _PROBLEMS[self.kind].least:
            held = f"class {names[0]} alone" if names else "no labelled pixel"
            raise ValueError(
                f"{prefix}target of {self.path!r} must hold at least 2 classes, got {held}: correct the targets, or "
                "give class_names"
            )
        if {"test_image", "test_feature", "test_target"} & set(arrays):
            test_image, test_target = self._pair(arrays, "test_", len(names))
            if test_image.shape[1:] != image.shape[1:] or test_image.dtype != image.dtype:
                raise ValueError(
                    f"test samples of {self.path!r} must be like the training samples {tuple(image.shape[1:])}, got "
                    f"{tuple(test_image.shape[1:])}: give both in one shape and dtype"
                )
            return names, Arrays(image, target, test_image, test_target)
        generator = numpy_generator(0, "test_split")  # does not use self.seed: all runs have the same test samples
        single = self.kind == "single_label"
        by_class, classes = (target.numpy(), len(names)) if single else (np.zeros(len(target), np.int64), 1)
        test = take_fraction(by_class, classes, self.test_fraction, generator, leave=1)
        if not len(test):
            raise ValueError(
                f"test_fraction={self.test_fraction} of {len(target)} samples leaves the test split empty: raise it"
            )
        train = without(len(target), test)
        return names, Arrays(image[train], target[train], image[test], target[test])

    def _pair(self, arrays: dict[str, np.ndarray], prefix: str, num_classes: int | None) -> tuple[Tensor, Tensor]:
        key = f"{prefix}feature" if f"{prefix}feature" in arrays else f"{prefix}image"
        check_keys(arrays, [key, f"{prefix}target"], repr(self.path))
        # two dimensions are features; to_image names what is wrong with anything else
        convert = to_feature if arrays[key].ndim == 2 else to_image
        image = convert(arrays[key], f"{key} of {self.path!r}")
        target, name = arrays[f"{prefix}target"], f"{prefix}target of {self.path!r}"
        if self.kind == "segmentation" and image.ndim == 2:
            raise ValueError(f"{name} may be masks only for images, got features: give a class for each sample")
        if target.ndim == {"single_label": 2, "segmentation": 4}.get(self.kind) and target.shape[-1] == 1:
            target = target[..., 0]
        if self.kind == "multi_label":
            if num_classes is not None and target.ndim == 2 and target.shape[1] != num_classes:
                raise ValueError(
                    f"class_names must have a name for each of the {target.shape[1]} columns of {name}, got "
                    f"{num_classes} names: give one per column"
                )
            return image, to_label_matrix(target, len(image), num_classes, name)
        if self.kind == "segmentation":
            return image, to_masks(target, len(image), num_classes, name, tuple(image.shape[1:]))
        return image, to_target(target, len(image), num_classes, name)
