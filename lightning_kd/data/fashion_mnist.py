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

# of the unpacked files: torchvision checks only the packed ones, when it fetches them
MD5 = {
    "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
    "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
    "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
    "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
}


class FashionMNISTDataModule(OfficialDataModule):
    """Fashion-MNIST: 60,000 training and 10,000 test images of 10 classes, 28 x 28 pixels, grey.

    Read from ``ROOT/fashion_mnist.npz`` where there is one (``train_image``, ``train_target``, ``test_image``,
    ``test_target``), else from the official files in ``ROOT/FashionMNIST/raw``, which are then decoded into it. All
    images stay in memory. See ``ClassificationDataModule`` for what it offers and for several processes.

    Args:
        root: the folder of the files.
        batch_size: training samples a step and process.
        eval_batch_size: the most samples an evaluation step and process.
        val_fraction: the share of each class of the training images that becomes the validation set, 0 to below 1.
        train_fraction: train on this share of what is left, of each class alike, above 0 to 1.
        train_per_class: train on this many images of each class instead.
        augment: pad training images by 4 black pixels, crop back at random and flip half of them.
        cutout: the side in pixels of a box set to the mean grey in each training image; 0 is off.
        mean: subtracted (0 to 1); by default the published 0.2860.
        std: divides; by default the published 0.3530.
        seed: fixes the validation split and the subset, for the same given labels (both are stratified by them);
            together with ``seed_everything`` also the order of the batches and the augmentation.
        download: fetch the official files where they are missing, and unpack them.
        fake: use a small made-up data set instead, without any file.
        noise: gives the training samples wrong labels, see ``LabelNoise``; ``None`` keeps the data set's own.
        balance: show each class equally often in training, whatever their sizes: an epoch stays as long, a rare sample
            comes several times (each time augmented anew), of a frequent class some wait for later epochs.
        candidates: gives training samples several labels, of which one is true, see ``UniformCandidates``,
            ``PairwiseCandidates`` and ``CandidateFile``.
        meta_per_class: so many training samples of each class are held out with their true labels, for methods that
            learn from candidates.
        annotations: gives the training samples labels by several annotators, see ``AnnotatedDataModule``.
        unlabelled: further samples without labels, or ``"rest"``, see ``ClassificationDataModule``.

    Raises:
        ValueError: for an argument out of its range, and for a damaged file or a wrong checksum.
        FileNotFoundError: where ``root`` holds no such files.
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
    """torchvision's, without the folder ``processed`` of its early versions, which nothing checks."""

    @property
    def raw_folder(self) -> str:
        return str(Path(self.root) / FashionMNISTDataModule.folder)

    def _check_legacy_exist(self) -> bool:
        return False


def _checked(path: Path) -> bytes:
    """What the file holds, after its checksum was found right."""
    content = path.read_bytes() if path.is_file() else b""
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != MD5[path.name]:
        raise RuntimeError(f"{path.name} not found or corrupted")
    return content


def _array(content: bytes) -> np.ndarray:
    """The uint8 array in an IDX file."""
    rank = content[3]
    shape = np.frombuffer(content, ">i4", rank, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape).copy()  # to be written to
