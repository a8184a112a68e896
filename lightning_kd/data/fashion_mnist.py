"""Fashion-MNIST."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from torchvision import datasets

from lightning_kd.data.augment import CropFlip
from lightning_kd.data.candidate_sets import CandidateSets
from lightning_kd.data.crowd_labels import CrowdLabels
from lightning_kd.data.label_noise import LabelNoise
from lightning_kd.data.published_sets import OfficialDataModule

FASHION_MNIST_CLASSES = [
    "T-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
]

# of the unpacked files: torchvision checks only the packed ones, after the download
MD5 = {
    "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
    "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
    "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
    "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
}


class FashionMNISTDataModule(OfficialDataModule):
    """Fashion-MNIST: 60,000 training and 10,000 test images of 10 classes, 28 x 28 pixels, grey.

    Read from ``ROOT/fashion_mnist.npz`` (``train_image``, ``train_target``, ``test_image``, ``test_target``) if it
    exists, else from the official files in ``ROOT/FashionMNIST/raw``, from which that file is then written. All images
    stay in memory. See ``ClassificationDataModule`` for attributes, loaders and use with several processes.

    Args:
        root: the folder of the files.
        batch_size: training samples per step and process.
        eval_batch_size: largest number of samples per evaluation step and process.
        val_fraction: fraction of each class of the training images that becomes the validation set, in [0, 1).
        train_fraction: fraction of each class of the remaining training images to train on, in (0, 1]. Default: all.
        train_per_class: number of images of each class to train on, instead of ``train_fraction``. Default: all.
        augment: random crops of training images padded by 4 black pixels, and left-right flips of half of them.
        cutout: side in pixels of a square set to the mean grey at a random place in each training image; 0 is off.
        mean: mean of the pixels (values from 0 to 1), to normalise images. Default: the published 0.2860.
        std: standard deviation of the pixels. Default: the published 0.3530.
        seed: fixes the validation split and the training subset, which are stratified by the given labels (so other
            labels give other splits); together with ``seed_everything`` also the order of the batches and the
            augmentation.
        download: download and unpack the official files where they are missing.
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

    file_name = "fashion_mnist.npz"
    folder = "FashionMNIST/raw"

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
            class_names=FASHION_MNIST_CLASSES,
            input_shape=(1, 28, 28),
            mean=[0.2860] if mean is None else mean,
            std=[0.3530] if std is None else std,
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
        if download:
            _RawFiles(root, train=train, download=True)
        files = {name: _checked(Path(root) / self.folder / name) for name in MD5}
        stem = "train" if train else "t10k"
        image, target = (_array(files[f"{stem}-{part}-ubyte"]) for part in ("images-idx3", "labels-idx1"))
        return {"image": image[..., None], "target": target.astype(np.int64)}


class _RawFiles(datasets.FashionMNIST):
    """torchvision's data set, without the folder ``processed`` of early versions, whose content has no checksum."""

    @property
    def raw_folder(self) -> str:
        return str(Path(self.root) / FashionMNISTDataModule.folder)

    def _check_legacy_exist(self) -> bool:
        return False


def _checked(path: Path) -> bytes:
    """The content of the file, after its MD5 checksum was verified."""
    content = path.read_bytes() if path.is_file() else b""
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != MD5[path.name]:
        raise RuntimeError(f"{path.name} not found or corrupted")
    return content


def _array(content: bytes) -> np.ndarray:
    """The uint8 array in an IDX file."""
    rank = content[3]
    shape = np.frombuffer(content, ">i4", rank, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape).copy()  # frombuffer is read-only
