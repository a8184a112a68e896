"""CIFAR-10 and CIFAR-100."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Literal

import numpy as np
from torchvision import datasets

from lightning_kd.data.augment import CropFlip
from lightning_kd.data.candidate_sets import CandidateSets
from lightning_kd.data.crowd_labels import CrowdLabels
from lightning_kd.data.label_noise import LabelNoise
from lightning_kd.data.published_sets import OfficialDataModule

CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]

CIFAR100_CLASSES = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish
forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle
mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale
willow_tree wolf woman worm
""".split()  # noqa: SIM905

CIFAR100_COARSE_CLASSES = """
aquatic_mammals fish flowers food_containers fruit_and_vegetables household_electrical_devices household_furniture
insects large_carnivores large_man-made_outdoor_things large_natural_outdoor_scenes large_omnivores_and_herbivores
medium_mammals non-insect_invertebrates people reptiles small_mammals trees vehicles_1 vehicles_2
""".split()  # noqa: SIM905

CIFAR100_COARSE = [  # index of the superclass of each fine class
    *(4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11, 6, 11, 5, 10, 7),
    *(6, 13, 15, 3, 15, 0, 11, 1, 10, 12, 14, 16, 9, 11, 5, 5, 19, 8, 8, 15, 13, 14, 17, 18, 10),
    *(16, 4, 17, 4, 2, 0, 17, 4, 18, 17, 10, 3, 2, 12, 12, 16, 12, 1, 9, 19, 2, 10, 0, 1, 16),
    *(12, 9, 13, 15, 13, 16, 19, 2, 4, 6, 19, 5, 5, 8, 19, 18, 1, 2, 15, 6, 0, 17, 8, 14, 13),
]


class CIFAR10DataModule(OfficialDataModule):
    """CIFAR-10: 50,000 training and 10,000 test colour images of 10 classes, 32 x 32 pixels.

    Read from ``ROOT/cifar10.npz`` (``train_image``, ``train_target``, ``test_image``, ``test_target``) if it exists,
    else from the official files in ``ROOT/cifar-10-batches-py``, from which that file is then written. All images stay
    in memory. See ``ClassificationDataModule`` for attributes, loaders and use with several processes.

    Args:
        root: the folder of the files.
        batch_size: training samples per step and process.
        eval_batch_size: largest number of samples per evaluation step and process.
        val_fraction: fraction of each class of the training images that becomes the validation set, in [0, 1). The
            published protocols have none: 0.
        train_fraction: fraction of each class of the remaining training images to train on, in (0, 1]. Default: all.
        train_per_class: number of images of each class to train on, instead of ``train_fraction``. Default: all.
        augment: random crops of training images padded by 4 black pixels, and left-right flips of half of them.
        cutout: side in pixels of a square set to the mean colour at a random place in each training image; 0 is off.
        mean: mean of each channel (values from 0 to 1), to normalise images. Default: the published 0.4914, 0.4822,
            0.4465.
        std: standard deviation of each channel. Default: the published 0.2470, 0.2435, 0.2616.
        seed: fixes the validation split and the training subset, which are stratified by the given labels (so other
            labels give other splits); together with ``seed_everything`` also the order of the batches and the
            augmentation.
        download: download the official files where they are missing.
        fake: use a small synthetic data set instead, without any file.
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
        ValueError: for an argument out of its range, a damaged file or a wrong checksum.
        FileNotFoundError: where ``root`` does not hold the files.
    """

    file_name = "cifar10.npz"
    folder = "cifar-10-batches-py"

    def __init__(
        self,
        root: str = "data",
        batch_size: int = 64,
        eval_batch_size: int = 256,
        val_fraction: float = 0.1,
        train_fraction: float | None = None,
        train_per_class: int | None = None,
        augment: bool = True,
        cutout: int = 0,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        seed: int = 0,
        download: bool = False,
        fake: bool = False,
        noise: LabelNoise | None = None,
        balance: bool = False,
        candidates: CandidateSets | None = None,
        meta_per_class: int | None = None,
        annotations: CrowdLabels | None = None,
        unlabelled: str | None = None,
    ) -> None:
        super().__init__(
            root,
            download=download,
            augment=augment,
            crop_flip=CropFlip(padding=4, flip=True),
            class_names=CIFAR10_CLASSES,
            input_shape=(3, 32, 32),
            mean=[0.4914, 0.4822, 0.4465] if mean is None else mean,
            std=[0.2470, 0.2435, 0.2616] if std is None else std,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            val_fraction=val_fraction,
            train_fraction=train_fraction,
            train_per_class=train_per_class,
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

    def open_official(self, root: str, train: bool, download: bool) -> dict[str, np.ndarray]:
        data = datasets.CIFAR10(root, train=train, download=download)
        return {"image": np.ascontiguousarray(data.data), "target": np.asarray(data.targets, dtype=np.int64)}


class CIFAR100DataModule(OfficialDataModule):
    """CIFAR-100: 50,000 training and 10,000 test colour images of 100 classes (or 20 superclasses), 32 x 32 pixels.

    Read from ``ROOT/cifar100.npz`` (``train_image``, ``train_target``, ``test_image``, ``test_target``; for coarse
    labels also ``train_coarse``, ``test_coarse``) if it exists, else from the official files in
    ``ROOT/cifar-100-python``, from which that file is then written. All images stay in memory. See
    ``ClassificationDataModule`` for attributes, loaders and use with several processes.

    Args:
        root: the folder of the files.
        labels: ``"fine"`` for the 100 classes, ``"coarse"`` for the 20 superclasses.
        batch_size: training samples per step and process.
        eval_batch_size: largest number of samples per evaluation step and process.
        val_fraction: fraction of each class of the training images that becomes the validation set, in [0, 1). The
            published protocols have none: 0.
        train_fraction: fraction of each class of the remaining training images to train on, in (0, 1]. Default: all.
        train_per_class: number of images of each class to train on, instead of ``train_fraction``. Default: all.
        augment: random crops of training images padded by 4 black pixels, and left-right flips of half of them.
        cutout: side in pixels of a square set to the mean colour at a random place in each training image; 0 is off.
        mean: mean of each channel (values from 0 to 1), to normalise images. Default: the published 0.5071, 0.4867,
            0.4408.
        std: standard deviation of each channel. Default: the published 0.2675, 0.2565, 0.2761.
        seed: fixes the validation split and the training subset, which are stratified by the given labels (so other
            labels give other splits); together with ``seed_everything`` also the order of the batches and the
            augmentation.
        download: download the official files where they are missing.
        fake: use a small synthetic data set instead, without any file.
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
        ValueError: for an argument out of its range, a damaged file or a wrong checksum.
        FileNotFoundError: where ``root`` does not hold the files.
    """

    file_name = "cifar100.npz"
    folder = "cifar-100-python"

    def __init__(
        self,
        root: str = "data",
        labels: Literal["fine", "coarse"] = "fine",
        batch_size: int = 64,
        eval_batch_size: int = 256,
        val_fraction: float = 0.1,
        train_fraction: float | None = None,
        train_per_class: int | None = None,
        augment: bool = True,
        cutout: int = 0,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        seed: int = 0,
        download: bool = False,
        fake: bool = False,
        noise: LabelNoise | None = None,
        balance: bool = False,
        candidates: CandidateSets | None = None,
        meta_per_class: int | None = None,
        annotations: CrowdLabels | None = None,
        unlabelled: str | None = None,
    ) -> None:
        if labels not in ("fine", "coarse"):
            raise ValueError(f"labels must be 'fine' or 'coarse', got {labels!r}: choose one")
        super().__init__(
            root,
            download=download,
            augment=augment,
            crop_flip=CropFlip(padding=4, flip=True),
            class_names=CIFAR100_CLASSES if labels == "fine" else CIFAR100_COARSE_CLASSES,
            input_shape=(3, 32, 32),
            mean=[0.5071, 0.4867, 0.4408] if mean is None else mean,
            std=[0.2675, 0.2565, 0.2761] if std is None else std,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            val_fraction=val_fraction,
            train_fraction=train_fraction,
            train_per_class=train_per_class,
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
        self.labels = labels
        self.target_key = "target" if labels == "fine" else "coarse"

    def open_official(self, root: str, train: bool, download: bool) -> dict[str, np.ndarray]:
        data = datasets.CIFAR100(root, train=train, download=download)
        # torchvision does not return the coarse labels; the call above has checked the checksum of this file
        entry = pickle.loads(
            (Path(root) / self.folder / ("train" if train else "test")).read_bytes(), encoding="latin1"
        )
        return {
            "image": np.ascontiguousarray(data.data),
            "target": np.asarray(data.targets, dtype=np.int64),
            "coarse": np.asarray(entry["coarse_labels"], dtype=np.int64),
        }
