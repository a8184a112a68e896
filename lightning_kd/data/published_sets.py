"""The base class of published data sets: the official files are decoded once and stored as one ``.npz``."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np

from lightning_kd.data.annotated_data import AnnotatedDataModule
from lightning_kd.data.array_files import Arrays, check_keys, read_arrays, to_image, to_target, write_npz
from lightning_kd.data.augment import CropFlip


class OfficialDataModule(AnnotatedDataModule):
    """A published data set, read from ``ROOT/NAME.npz``, else from the official files in torchvision's layout.

    The ``.npz`` holds ``train_image`` and ``test_image`` (uint8 ``[N, H, W, C]``) and ``train_target`` and
    ``test_target`` (integers ``[N]``); other arrays are ignored. If it exists nothing else is read. Otherwise
    ``prepare_data`` verifies the checksums of the official files, decodes them and writes it.

    Args:
        root: the folder of the files.
        download: download the official files where they are missing.
        augment: random crops and flips of training images.
        crop_flip: the random crop and flip.
        options: see ``ClassificationDataModule``.
    """

    file_name: str
    folder: str
    target_key = "target"

    def __init__(
        self, root: str, *, download: bool, augment: bool, crop_flip: CropFlip, fake: bool, **options: Any
    ) -> None:
        super().__init__(crop_flip=crop_flip if augment else None, fake=fake, **options)
        self.root = root
        self.download = download
        self.augment = augment

    @property
    def path(self) -> Path:
        """Path of the ``.npz``."""
        return Path(self.root) / self.file_name

    @abstractmethod
    def open_official(self, root: str, train: bool, download: bool) -> dict[str, np.ndarray]:
        """Read one split from the official files: ``image``, ``target``, and further arrays by name.

        Raises:
            RuntimeError: where files are missing or have a wrong checksum, as torchvision raises it.
        """

    def read_official(self) -> dict[str, np.ndarray]:
        """All arrays of the ``.npz``, read from the official files.

        Raises:
            FileNotFoundError: where there are none, and ``download`` is false.
            ConnectionError: where they cannot be downloaded.
            PermissionError: where ``root`` may not be read or written.
            ValueError: where a checksum is wrong, or a file cannot be read.
        """
        root = Path(self.root)
        if not self.download and not (root / self.folder).exists():
            state = "holds neither" if root.exists() else "does not exist and so holds neither"
            raise FileNotFoundError(
                f"root={self.root!r} {state} {self.file_name} nor the official files in {self.folder}/: give the "
                "folder that does, or set download=True"
            )
        arrays = {}
        try:
            for split in ("train", "test"):
                # the download for the first split includes the second
                parts = self.open_official(self.root, split == "train", self.download and split == "train")
                arrays.update({f"{split}_{name}": array for name, array in parts.items()})
        except PermissionError as error:
            raise PermissionError(f"root={self.root!r} may not be used ({error}): check its permissions") from error
        except URLError as error:
            raise ConnectionError(
                f"download=True could not download the official files into root={self.root!r} ({error}): check the "
                f"network, or put {self.file_name} there"
            ) from error
        except Exception as error:  # whatever a damaged file makes a reader raise
            raise ValueError(
                f"the official files in {str(root / self.folder)!r} are missing, damaged, or have a wrong checksum "
                f"({error}): delete that folder and set download=True to download them again"
            ) from error
        return arrays

    def prepare_data(self) -> None:
        """Write the ``.npz`` if it does not exist. If it cannot be written, continue without it, with a warning."""
        if self.fake or self.path.exists():
            return
        arrays = self.read_official()
        try:
            write_npz(self.path, arrays)
        except OSError as error:
            warnings.warn(
                f"{error}; until then the official files are decoded each time",
                stacklevel=2,
            )

    def load_arrays(self) -> Arrays:
        arrays = read_arrays(self.path, "") if self.path.exists() else self.read_official()
        names = [f"{split}_{part}" for split in ("train", "test") for part in ("image", self.target_key)]
        where = repr(str(self.path))
        check_keys(arrays, names, where)
        channels, height, width = self.input_shape
        image = [to_image(arrays[name], f"{name} of {where}", (height, width, channels)) for name in names[::2]]
        target = [
            to_target(arrays[name], len(part), self.num_classes, f"{name} of {where}")
            for name, part in zip(names[1::2], image, strict=True)
        ]
        return Arrays(image[0], target[0], image[1], target[1])
