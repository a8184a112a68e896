"""The base class of data modules that read multi-label images from files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageDraw
from torchvision.transforms import v2

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.problems import MultiLabel
from lightning_kd.data.array_files import Arrays
from lightning_kd.data.augment import PATCHES, CropFlip, expand_views
from lightning_kd.data.fake_data import fake_label_arrays
from lightning_kd.data.image_check import check_images
from lightning_kd.data.image_files import truncated_allowed
from lightning_kd.data.multi_label_data import MultiLabelDataModule
from lightning_kd.data.sampling import BatchLoader, ShardedSampler
from lightning_kd.data.streaming import ImageFiles, StreamingLoader
from lightning_kd.data.weak_labels import CandidateLabels, SinglePositive

__all__ = ["MultiLabelFilesDataModule", "read_lines"]

# the splits whose images a stage uses
SPLITS_OF = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("test",)}


class MultiLabelFilesDataModule(MultiLabelDataModule):
    """Multi-label images that are read from disk when needed. Subclasses find the files and their labels.

    Every view is resized to a square of ``image_size`` without keeping the aspect ratio, because a crop could cut off
    what a label refers to. ``"weak"`` views are also flipped with probability 1/2; ``"strong"`` views are flipped, get
    a square of one random colour, and torchvision's RandAugment (2 operations, magnitude 9). The random numbers of an
    image depend only on (seed, epoch, pass, index), not on workers or processes. ``train_image`` and so on are lists of
    paths.

    Args:
        class_names: a name for each class.
        root: the folder of the data set.
        image_size: height and width of the network's input.
        batch_size: training images per step and process.
        eval_batch_size: largest number of images per evaluation step and process.
        val_fraction: fraction of the training images that becomes the validation set, in [0, 1).
        train_fraction: fraction of the remaining training samples to train on, in (0, 1]. Default: all.
        num_workers: number of worker processes that decode images; 0 decodes in the training process.
        augment: train on weak views; else training images are prepared as evaluation images.
        flip: whether weak and strong views are flipped.
        strong_cutout: side in pixels of the square of strong views; 0 is off. Default: half of ``image_size``.
        mean: mean of each channel (values from 0 to 1). Default: that of ImageNet, 0.485, 0.456, 0.406.
        std: standard deviation of each channel. Default: that of ImageNet, 0.229, 0.224, 0.225.
        normalize: normalise with ``mean`` and ``std``; else channels stay from 0 to 1.
        n_grid: cells per row and per column of an image, for the views ``"patches"`` and ``"strong_patches"``; must
            divide ``image_size``.
        seed: fixes the validation split and the training subset; together with ``seed_everything`` also the order of
            the batches and the augmentation.
        fake: use a small synthetic data set in memory instead.
        candidates: see ``MultiLabelDataModule``.
        single_positive: see ``MultiLabelDataModule``.
        labelled_fraction: see ``MultiLabelDataModule``.
        labelled_seed: see ``MultiLabelDataModule``.
        background: red, green and blue, 0 to 255, shown where an image is transparent.
        image_range: the two pixel values that become black and white in images of more than 8 bits. Default: 0 and
            65535 for 16 bits; float and 32-bit integer images need it.
        on_error: ``"skip"`` leaves out damaged image files with a warning; ``"raise"`` raises an error that names them
            before they are used.
        truncated: accept truncated JPEG files; their missing part becomes grey.

    Raises:
        ValueError: for an argument out of its range, and for files that are damaged or inconsistent.
        FileNotFoundError, PermissionError: where a file or folder does not exist or may not be read.
    """

    def __init__(
        self,
        *,
        class_names: list[str],
        root: str,
        image_size: int = 224,
        batch_size: int = 64,
        eval_batch_size: int = 256,
        val_fraction: float = 0.1,
        train_fraction: float | None = None,
        num_workers: int = 0,
        augment: bool = True,
        flip: bool = True,
        strong_cutout: int | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        normalize: bool = True,
        n_grid: int = 2,
        seed: int = 0,
        fake: bool = False,
        candidates: CandidateLabels | None = None,
        single_positive: SinglePositive | None = None,
        labelled_fraction: float | None = None,
        labelled_seed: int = 1,
        background: tuple[int, int, int] = (255, 255, 255),
        image_range: tuple[float, float] | None = None,
        on_error: Literal["raise", "skip"] = "raise",
        truncated: bool = False,
    ) -> None:
        check_numbers(least=1, whole=True, image_size=image_size)
        check_numbers(least=0, whole=True, num_workers=num_workers)
        check_numbers(least=0, whole=True, optional=True, strong_cutout=strong_cutout)
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error must be 'raise' or 'skip', got {on_error!r}: choose one")
        super().__init__(
            class_names=class_names,
            input_shape=(3, image_size, image_size),
            mean=[0.485, 0.456, 0.406] if mean is None else mean,
            std=[0.229, 0.224, 0.225] if std is None else std,
            normalize=normalize,
            n_grid=n_grid,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            val_fraction=val_fraction,
            train_fraction=train_fraction,
            crop_flip=CropFlip(image_size // 8, flip) if augment else None,  # for synthetic images only
            seed=seed,
            fake=fake,
            problem=MultiLabel(len(class_names)),
            candidates=candidates,
            single_positive=single_positive,
            labelled_fraction=labelled_fraction,
            labelled_seed=labelled_seed,
        )
        self.root = root
        self.image_size = image_size
        self.num_workers = num_workers
        self.augment = augment
        self.flip = flip
        self.strong_cutout = image_size // 2 if strong_cutout is None else strong_cutout
        self.background = background
        self.image_range = image_range
        self.on_error = on_error
        self.truncated = truncated
        self._checked: set[str] = set()  # splits whose files were checked

    def fake_arrays(self) -> Arrays:
        return fake_label_arrays(self.input_shape, self.num_classes)

    def describe(self) -> dict[str, Any]:
        """As ``LabelledDataModule.describe``, with the resize, colour and truncation settings."""
        found: dict[str, Any] = {"stretch": True, "background": list(self.background), "truncated": self.truncated}
        found["image_range"] = None if self.image_range is None else list(self.image_range)
        return super().describe() | found

    def setup(self, stage: str | None = None) -> None:
        """Load and split the data, once, and check the image files of the splits that the stage uses."""
        super().setup(stage)
        self._check(SPLITS_OF.get(stage or "", ()) if self.trainer is not None else ("train", "val", "test"))

    def check_files(self, *splits: str) -> None:
        """Check the image files of some splits, once; without a Trainer only to leave out damaged ones.

        Raises:
            ValueError: where some cannot be read, or leaving them out would empty a split.
        """
        self.setup()
        self._check(splits)

    def _load(self) -> None:
        super()._load()
        self._checked = set()  # the indices again contain the files that were left out

    def _check(self, splits: Sequence[str]) -> None:
        # without a Trainer files are not checked, unless indices must leave out damaged ones as under a Trainer
        wanted = not self.fake and (self.trainer is not None or self.on_error == "skip")
        splits = [split for split in splits if wanted and split not in self._checked]
        used = {split: [split, *["unlabelled"] * (split == "train")] for split in splits}
        files = [path for split in splits for name in used[split] for path in self._files(name)]
        # results with and without truncated files allowed are cached separately
        root = f"{self.root}/truncated allowed" if self.truncated else self.root
        with truncated_allowed(self.truncated):
            damaged = check_images(files, root, self.on_error, self.image_range, self.trainer) if splits else set()
        for split in splits if damaged else ():
            for name in used[split]:
                is_whole = np.array([path not in damaged for path in self._files(name)], dtype=bool)
                if len(is_whole) and not is_whole.any():
                    raise ValueError(
                        f"no image of split {name!r} can be read, so on_error='skip' leaves none: replace them"
                    )
                setattr(self, f"{name}_indices", getattr(self, f"{name}_indices")[is_whole])
            self._digest = None
        self._checked = {*self._checked, *splits}

    def _files(self, name: str) -> list[str]:
        source = {"val": self._val_source, "unlabelled": "train"}.get(name, name)
        paths = getattr(self, f"{source}_image")
        return [paths[i] for i in getattr(self, f"{name}_indices")]

    def _make_loader(self, source: str, sampler: ShardedSampler, views: str | Sequence[str]) -> BatchLoader:
        if self.fake:
            return super()._make_loader(source, sampler, views)
        single = isinstance(views, str) and views not in PATCHES
        made = expand_views([views] if isinstance(views, str) else views, self.n_grid)
        transforms = [self.transform(*view) for view in made]
        transform = transforms[0] if single else transforms
        paths, target = getattr(self, f"{source}_image"), getattr(self, f"{source}_target")
        files = ImageFiles(
            paths, target, transform, sampler.seed, self.background, self.image_range, truncated=self.truncated
        )
        return StreamingLoader(
            files,
            sampler,
            num_workers=self.num_workers,
            pin_memory=self._process()[2].type == "cuda",
            extras=self._extras(source),
        )

    def transform(self, view: str, cell: int | None = None) -> v2.Compose:
        """The transform of a view, from a PIL image in RGB to float32 ``[3, S, S]``.

        Args:
            view: ``"plain"``, ``"weak"`` or ``"strong"``, see the class.
            cell: show only this cell of the resized image, counted row by row, resized to the whole size.
        """
        size = [self.image_size] * 2
        steps: list[torch.nn.Module] = [v2.Resize(size)]
        if cell is not None:
            steps = [*steps, Cell(cell, self.n_grid or 1), *steps]
        if view != "plain" and self.flip and self.augment:
            steps.insert(0, v2.RandomHorizontalFlip())
        if view == "strong":
            steps += [ColourCutout(self.strong_cutout), v2.RandAugment()]
        steps += [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
        if self.normalize:
            steps.append(v2.Normalize(self.mean, self.std))
        return v2.Compose(steps)


class Cell(torch.nn.Module):
    """Crop one of ``n_grid`` x ``n_grid`` equal cells of a PIL image, counted row by row."""

    def __init__(self, cell: int, n_grid: int) -> None:
        super().__init__()
        self.cell = cell
        self.n_grid = n_grid

    def forward(self, image: Image.Image) -> Image.Image:
        width, height = (length // self.n_grid for length in image.size)
        top, left = self.cell // self.n_grid * height, self.cell % self.n_grid * width
        return image.crop((left, top, left + width, top + height))


class ColourCutout(torch.nn.Module):
    """Fill a square of ``side`` x ``side`` pixels of a PIL image with a random colour, around a random pixel."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, image: Image.Image) -> Image.Image:
        column, row = (int(torch.randint(length, ())) for length in image.size)
        colour = tuple(torch.randint(256, (3,)).tolist())
        if not self.side:
            return image
        image = image.copy()
        left, top = column - self.side // 2, row - self.side // 2
        ImageDraw.Draw(image).rectangle((left, top, left + self.side - 1, top + self.side - 1), fill=colour)
        return image


def read_lines(path: Path) -> list[tuple[int, list[str]]]:
    """Line number and words of each line of a text file that is not blank; words are separated by whitespace.

    Raises:
        FileNotFoundError, PermissionError: where the file does not exist, or may not be read.
        ValueError: where it is not text in UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise FileNotFoundError(f"{str(path)!r} does not exist: is root the folder of the data set?") from None
    except PermissionError:
        raise PermissionError(f"{str(path)!r} may not be read: check the permissions of the file") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is not text in UTF-8 ({error}): replace it") from None
    return [(number, words) for number, line in enumerate(text.splitlines(), 1) if (words := line.split())]
