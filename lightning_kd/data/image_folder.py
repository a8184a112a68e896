"""Data module for your own images in folders, one folder per class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torchvision.transforms import AutoAugmentPolicy, v2

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.notes import note
from lightning_kd.core.seeding import numpy_generator
from lightning_kd.core.view_keys import ViewKeys
from lightning_kd.data.arguments import names_of
from lightning_kd.data.array_files import Arrays
from lightning_kd.data.augment import CropFlip, RandomCutout
from lightning_kd.data.candidate_sets import CandidateSets
from lightning_kd.data.crop_files import CropFiles, CropRecipe, PlainFiles
from lightning_kd.data.crowd_labels import CrowdLabels
from lightning_kd.data.image_files import class_folders, find_images, read_image
from lightning_kd.data.label_noise import LabelNoise
from lightning_kd.data.new_samples import files_to_predict
from lightning_kd.data.sampling import BatchLoader, ShardedSampler
from lightning_kd.data.split_files import SplitFiles
from lightning_kd.data.splits import take_fraction, without
from lightning_kd.data.streaming import ImageFiles, KeyedFiles, StreamingLoader


class ImageFolderDataModule(SplitFiles):
    """Your own images in folders, read from disk when they are needed.

    Either ``ROOT/train/CLASS/...``, with optional ``ROOT/val`` and ``ROOT/test`` of the same form, or just
    ``ROOT/CLASS/...``. Folders inside a class folder are searched too; hidden folders are skipped. Classes are the
    folders in alphabetical order.

    Without ``test`` the images of ``val`` are the test set; without ``val`` as well, the test set is ``test_fraction``
    of each class, the same images for every ``seed``. The validation set is ``val`` if that is not the test set, else
    ``val_fraction`` of each class of the training images.

    As usual for ImageNet, training images get ``RandomResizedCrop`` and are flipped with probability 1/2; evaluation
    images are resized by their short side and centre-cropped. The random numbers of an image depend only on (seed,
    epoch, pass, index), not on workers or processes. ``train_image`` and so on are lists of paths. See
    ``ClassificationDataModule`` for attributes, loaders and use with several processes.

    Args:
        root: the folder of the images.
        image_size: height and width of the network's input.
        scale: smallest and largest fraction of the image's area that a random crop covers.
        ratio: smallest and largest aspect ratio, width / height, of a random crop.
        batch_size: training images per step and process.
        eval_batch_size: largest number of images per evaluation step and process.
        val_fraction: fraction of each class of the training images that becomes the validation set, in [0, 1).
        test_fraction: fraction of each class that becomes the test set where there is no test folder, in (0, 1).
        train_fraction: fraction of each class of the remaining training images to train on, in (0, 1]. Default: all.
        train_per_class: number of images of each class to train on, instead of ``train_fraction``. Default: all.
        num_workers: number of worker processes that decode images; 0 decodes in the training process.
        augment: random crops and flips of training images; else they are prepared as evaluation images.
        cutout: side in pixels of a square set to the mean colour at a random place in each training image; 0 is off.
        mean: mean of each channel (values from 0 to 1). Default: that of ImageNet, 0.485, 0.456, 0.406.
        std: standard deviation of each channel. Default: that of ImageNet, 0.229, 0.224, 0.225.
        seed: fixes the validation split and the training subset, which are stratified by the given labels (so other
            labels give other splits); together with ``seed_everything`` also the order of the batches and the
            augmentation.
        fake: use a small synthetic data set in memory instead, with the classes of ``root`` if it exists, else 10
            classes.
        noise: label noise for the training samples, see ``LabelNoise``. Default: the labels of the data set.
        resize: short side that evaluation images are resized to before the centre crop. Default:
            ``image_size * 256 / 224``.
        strong_crop: ``"resized"`` crops strong views as weak ones; ``"fixed"`` resizes the short side to ``resize`` and
            takes a random square of ``image_size``.
        strong_cutout: side in pixels of the cutout square of strong views; 0 is off. Default: half of ``image_size``.
        background: red, green and blue, 0 to 255, shown where an image is transparent.
        image_range: the two pixel values that become black and white in images of more than 8 bits. Default: 0 and
            65535 for 16 bits; float and 32-bit integer images need it.
        on_error: ``"skip"`` leaves out damaged image files with a warning, but raises an error where a split or class
            would be empty; ``"raise"`` raises an error that names all damaged files before they are used.
        class_names: the folder names in the order of their class indices. Default: sorted. With it ``root`` need not
            exist to predict; ``lightning-kd predict`` takes it from the checkpoint.
        predict: images to predict instead of the test set, without labels: a folder of any depth, an image, or a list
            of images (``.txt``, ``.csv``; see ``files_to_predict``).
        balance: draw each class equally often in training. The epoch keeps its length: samples of rare classes are
            repeated (with new augmentation each time), some of frequent classes wait for later epochs.
        candidates: gives each training sample a candidate set: several labels, of which one is true. See
            ``UniformCandidates``, ``PairwiseCandidates`` and ``CandidateFile``.
        meta_per_class: number of training samples of each class to hold out with their true labels (the meta set), for
            methods that learn from candidates.
        annotations: gives the training samples labels by several annotators, see ``AnnotatedDataModule``.
        unlabelled: further training samples without labels, or ``"rest"``, see ``ClassificationDataModule``.

    Raises:
        ValueError: for an argument out of its range, a root without class folders, or a class without an image.
        FileNotFoundError, PermissionError: where ``root`` does not exist or may not be read.
    """

    strong_policy = AutoAugmentPolicy.IMAGENET

    def __init__(
        self,
        root: str,
        image_size: int = 224,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        batch_size: int = 64,
        eval_batch_size: int = 256,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        train_fraction: float | None = None,
        train_per_class: int | None = None,
        num_workers: int = 0,
        augment: bool = True,
        cutout: int = 0,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        seed: int = 0,
        fake: bool = False,
        noise: LabelNoise | None = None,
        resize: int | None = None,
        strong_crop: Literal["resized", "fixed"] = "resized",
        strong_cutout: int | None = None,
        background: tuple[int, int, int] = (255, 255, 255),
        image_range: tuple[float, float] | None = None,
        on_error: Literal["raise", "skip"] = "raise",
        class_names: Sequence[str | int] | None = None,
        predict: str | None = None,
        balance: bool = False,
        candidates: CandidateSets | None = None,
        meta_per_class: int | None = None,
        annotations: CrowdLabels | None = None,
        unlabelled: str | None = None,
    ) -> None:
        check_numbers(least=1, whole=True, image_size=image_size)
        check_numbers(least=0, whole=True, num_workers=num_workers)
        check_numbers(above=0, below=1, remedy="give a fraction", test_fraction=test_fraction)
        for name, limits in (("scale", scale), ("ratio", ratio)):
            for limit in limits:
                check_numbers({name: limit}, above=0)
            if len(limits) != 2 or limits[0] > limits[1]:
                raise ValueError(f"{name} must be two numbers above 0, the smaller one first, got {limits}: swap them")
        check_numbers(least=image_size, whole=True, optional=True, remedy="no smaller than image_size", resize=resize)
        if strong_crop not in ("resized", "fixed"):
            raise ValueError(f"strong_crop must be 'resized' or 'fixed', got {strong_crop!r}: choose one")
        check_numbers(least=0, whole=True, optional=True, strong_cutout=strong_cutout)
        for colour in background:
            check_numbers(least=0, most=255, background=colour)
        if len(background) != 3:
            raise ValueError(f"background must be three numbers from 0 to 255, got {background}: give a colour")
        for value in image_range or ():
            check_numbers(image_range=value)
        if image_range is not None and (len(image_range) != 2 or image_range[0] >= image_range[1]):
            raise ValueError(f"image_range must be two numbers, the smaller one first, got {image_range}: swap them")
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error must be 'raise' or 'skip', got {on_error!r}: choose one")
        self.background = background
        self.image_range = image_range
        self.on_error = on_error
        self._checked = set()
        self.root = root
        self.image_size = image_size
        self.scale = scale
        self.ratio = ratio
        self.resize = round(image_size * 256 / 224) if resize is None else resize
        self.strong_crop = strong_crop
        self.strong_cutout = image_size // 2 if strong_cutout is None else strong_cutout
        self.test_fraction = test_fraction
        self.num_workers = num_workers
        self.augment = augment
        if given := names_of(class_names):
            names = given
        elif fake and not Path(root).is_dir():
            names = [f"class_{c}" for c in range(10)]
        else:
            names = class_folders(self._split_root("train") or Path(root))
            if all(name.isdecimal() for name in names) and names != sorted(names, key=int):
                note(f"class folders are sorted as text, not as numbers (as in torchvision): {', '.join(names)}")
        super().__init__(
            class_names=names,
            input_shape=(3, image_size, image_size),
            mean=[0.485, 0.456, 0.406] if mean is None else mean,
            std=[0.229, 0.224, 0.225] if std is None else std,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            val_fraction=val_fraction,
            train_fraction=train_fraction,
            train_per_class=train_per_class,
            crop_flip=CropFlip(image_size // 8) if augment else None,  # for synthetic images only
            cutout=cutout,
            seed=seed,
            fake=fake,
            noise=noise,
            annotations=annotations,
            predict=predict,
            balance=balance,
            candidates=candidates,
            meta_per_class=meta_per_class,
            unlabelled=unlabelled,
        )

    def load_new(self) -> list[str]:
        return files_to_predict(str(self.predict))

    def describe(self) -> dict[str, Any]:
        """As ``LabelledDataModule.describe``, with the resize and colour settings of evaluation images."""
        found: dict[str, Any] = {"resize": self.resize, "background": list(self.background)}
        found["image_range"] = None if self.image_range is None else list(self.image_range)
        return super().describe() | found

    def load_arrays(self) -> Arrays:
        roots = {split: self._split_root(split) for split in ("train", "val", "test")}
        train_root = roots["train"] or Path(self.root)
        if lacking := [name for name in self.class_names if not (train_root / name).is_dir()]:
            raise ValueError(f"class_names has {lacking[0]!r}, which is not a folder in {str(train_root)!r}: correct")
        train = find_images(train_root, self.class_names)
        test_root = self._test_root()
        if test_root is not None:
            test = find_images(test_root, self.class_names)
            own_val = roots["val"] if roots["test"] else None
            return Arrays(*train, *test, *(find_images(own_val, self.class_names) if own_val else ()))
        paths, target = train
        generator = numpy_generator(0, "test_split")  # does not use self.seed: all runs have the same test images
        chosen = take_fraction(target.numpy(), self.num_classes, self.test_fraction, generator, leave=1)
        if not len(chosen):
            raise ValueError(
                f"test_fraction={self.test_fraction} of {len(paths)} images leaves the test split empty: raise it"
            )
        rest = without(len(paths), chosen)
        return Arrays([paths[i] for i in rest], target[rest], [paths[i] for i in chosen], target[chosen])

    def _shown(self, image: Any) -> Image.Image | None:
        """The whole image of a file, not the crop that the network gets."""
        return read_image(image, self.background, self.image_range) if isinstance(image, str) else super()._shown(image)

    def _make_loader(self, source: str, sampler: ShardedSampler, views: str | Sequence[str]) -> BatchLoader:
        if self.fake and source != "predict":
            return super()._make_loader(source, sampler, views)
        transform = self.transform(views) if isinstance(views, str) else [self.transform(view) for view in views]
        paths, target = getattr(self, f"{source}_image"), getattr(self, f"{source}_target")
        files = ImageFiles(paths, target, transform, sampler.seed, self.background, self.image_range)
        return StreamingLoader(
            files,
            sampler,
            num_workers=self.num_workers,
            pin_memory=self._process()[2].type == "cuda",
            extras=self._extras(source),
            keyed=self._keyed(files, views),
        )

    def _keyed(self, files: ImageFiles, views: str | Sequence[str]) -> Callable[[ViewKeys], KeyedFiles] | None:
        """Files of the views that have keys: crops, or images without augmentation; ``None`` for other views."""
        if views not in ("plain", "weak"):
            return None
        if views == "weak" and self.cutout:
            cutout = self.cutout

            def refuse(keys: ViewKeys) -> KeyedFiles:
                raise ValueError(
                    f"a teacher store needs views by crop and flip alone, got cutout={cutout}: set data.cutout to 0"
                )

            return refuse
        if views == "plain" or not self.augment:
            return lambda keys: PlainFiles(files, self.resize, self.image_size, keys)
        recipe = CropRecipe(self.image_size, self.scale, self.ratio, tuple(self.mean), tuple(self.std))
        return lambda keys: CropFiles(files, recipe, keys)

    def transform(self, view: str) -> v2.Compose:
        """The transform of a view, from a PIL image in RGB to a normalised float32 ``[3, S, S]``.

        ``view`` is ``"plain"``, ``"weak"`` or ``"strong"``, see ``loader``. AutoAugment is applied after crop and flip,
        to the small image.
        """
        size = self.image_size
        if view != "plain" and self.augment:
            steps: list[torch.nn.Module] = [v2.RandomResizedCrop(size, scale=self.scale, ratio=self.ratio)]
            if view == "strong" and self.strong_crop == "fixed":
                steps = [v2.Resize(self.resize), v2.RandomCrop(size)]
            steps.append(v2.RandomHorizontalFlip())
        else:
            steps = [v2.Resize(self.resize), v2.CenterCrop(size)]
        if view == "strong":
            steps.append(v2.AutoAugment(self.strong_policy))
        steps += [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(self.mean, self.std)]
        cutout = {"plain": 0, "weak": self.cutout, "strong": self.strong_cutout}[view]
        if cutout:
            steps.append(RandomCutout(cutout))
        return v2.Compose(steps)
