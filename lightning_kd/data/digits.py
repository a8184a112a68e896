"""The handwritten digits of scikit-learn."""

from __future__ import annotations

import numpy as np

from lightning_kd.core.seeding import numpy_generator
from lightning_kd.data.annotated_data import AnnotatedDataModule
from lightning_kd.data.array_files import Arrays, to_image, to_target
from lightning_kd.data.augment import CropFlip
from lightning_kd.data.candidate_sets import CandidateSets
from lightning_kd.data.crowd_labels import CrowdLabels
from lightning_kd.data.label_noise import LabelNoise
from lightning_kd.data.splits import take_fraction, without


class DigitsDataModule(AnnotatedDataModule):
    """The 1,797 handwritten digits of scikit-learn: 10 classes, 8 x 8 pixels, grey. Needs no file and no download.

    There is no official test split: 20 % of each class are the test set, the same samples for every ``seed``. Pixels
    are scaled from 0..16 to uint8 0..255. See ``ClassificationDataModule`` for attributes, loaders and use with several
    processes.

    Args:
        batch_size: training samples per step and process.
        eval_batch_size: largest number of samples per evaluation step and process.
        val_fraction: fraction of each class of the training images that becomes the validation set, in [0, 1).
        train_fraction: fraction of each class of the remaining training images to train on, in (0, 1]. Default: all.
        train_per_class: number of images of each class to train on, instead of ``train_fraction``. Default: all.
        augment: random crops of training images padded by 1 black pixel; no flip.
        cutout: side in pixels of a square set to the mean grey at a random place in each training image; 0 is off.
        mean: mean of the pixels (values from 0 to 1), to normalise images. Default: that of the training images,
            0.3050.
        std: standard deviation of the pixels. Default: that of the training images, 0.3756.
        seed: fixes the validation split and the training subset, which are stratified by the given labels (so other
            labels give other splits); together with ``seed_everything`` also the order of the batches and the
            augmentation.
        fake: use a small synthetic data set of the same shape instead.
        noise: label noise for the training samples, see ``LabelNoise``. Default: the labels of the data set.
        balance: draw each class equally often in training. The epoch keeps its length: samples of rare classes are
            repeated (with new augmentation each time), some of frequent classes wait for later epochs.
        candidates: gives each training sample a candidate set: several labels, of which one is true. See
            ``UniformCandidates``, ``PairwiseCandidates`` and ``CandidateFile``.
        meta_per_class: number of training samples of each class to hold out with their true labels (the meta set), for
            methods that learn from candidates.
        annotations: gives the training samples labels by several annotators, see ``AnnotatedDataModule``.
        unlabelled: further training samples without labels, or ``"rest"``, see ``ClassificationDataModule``.

    Raises:
        ValueError: for an argument out of its range.
    """

    def __init__(
        self,
        batch_size: int = 64,
        eval_batch_size: int = 256,
        val_fraction: float = 0.1,
        train_fraction: float | None = None,
        train_per_class: int | None = None,
        augment: bool = False,
        cutout: int = 0,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        seed: int = 0,
        fake: bool = False,
        noise: LabelNoise | None = None,
        balance: bool = False,
        candidates: CandidateSets | None = None,
        meta_per_class: int | None = None,
        annotations: CrowdLabels | None = None,
        unlabelled: str | None = None,
    ) -> None:
        super().__init__(
            class_names=[str(digit) for digit in range(10)],
            input_shape=(1, 8, 8),
            mean=[0.3050] if mean is None else mean,
            std=[0.3756] if std is None else std,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            val_fraction=val_fraction,
            train_fraction=train_fraction,
            train_per_class=train_per_class,
            crop_flip=CropFlip(padding=1, flip=False) if augment else None,
            cutout=cutout,
            seed=seed,
            fake=fake,
            noise=noise,
            annotations=annotations,
            balance=balance,
            candidates=candidates,
            meta_per_class=meta_per_class,
            unlabelled=unlabelled,
        )
        self.augment = augment

    def load_arrays(self) -> Arrays:
        from sklearn.datasets import load_digits

        digits = load_digits()
        image = to_image(np.round(digits.images * (255 / 16)).astype(np.uint8), "digits")
        target = to_target(digits.target, len(image), 10, "digits")
        test = take_fraction(target.numpy(), 10, 0.2, numpy_generator(0, "test_split"))
        train = without(len(target), test)
        return Arrays(image[train], target[train], image[test], target[test])
