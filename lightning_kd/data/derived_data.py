"""The base class of data modules that take their samples from another data module."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import lightning as L
import numpy as np
from PIL import Image
from torch import Tensor

from lightning_kd.core.problems import SingleLabel
from lightning_kd.data.arguments import check_class_names
from lightning_kd.data.classification_data import ClassificationDataModule
from lightning_kd.data.sampling import BatchLoader
from lightning_kd.data.split_loaders import train_loader_of


class DerivedDataModule(L.LightningDataModule, ABC):
    """A data module that takes samples, sizes and statistics from ``source``, of which it keeps a shallow copy.

    Args:
        source: a data module with one class per sample; it stays unchanged.

    Raises:
        ValueError: where ``source`` has another kind of problem, or has candidates, a meta set, annotations, unlabelled
            samples, or samples to predict.
    """

    class_names: list[str]
    test_indices: np.ndarray
    val_indices: np.ndarray

    def __init__(self, source: ClassificationDataModule) -> None:
        super().__init__()
        if not source.problem.one_class:
            raise ValueError(
                f"source must have one class per sample, {type(source).__name__} has {source.problem.kind}: give other "
                "data"
            )
        if source.candidates is not None or source.meta_per_class is not None:
            raise ValueError(
                f"the source of a pool may have no candidates and no meta set, got candidates={source.candidates} and "
                f"meta_per_class={source.meta_per_class}: leave them out"
            )
        if source.predict is not None:
            raise ValueError(
                f"the source of a pool may have no predict, got {source.predict!r}: the prediction set is the pool; "
                "for other samples use lightning-kd predict --data.predict or lightning_kd.load(RUN).predict"
            )
        if source.unlabelled is not None:
            raise ValueError(f"the source of a pool may have no unlabelled, got {source.unlabelled!r}: give it as pool")
        annotations = getattr(source, "annotations", None)
        if annotations is not None:
            raise ValueError(f"the source of a pool may have no annotations, got {annotations}: leave them out")
        self.source = copy.copy(source)
        self.source._stored = {}

    @abstractmethod
    def loader(self, split: str = "train", indices: Any = None, **kwargs: Any) -> BatchLoader:
        """See ``ClassificationDataModule.loader``."""

    @property
    def problem(self) -> SingleLabel:
        return SingleLabel(self.num_classes)

    @property
    def num_classes(self) -> int:
        return self.source.num_classes

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self.source.input_shape

    @property
    def mean(self) -> list[float]:
        return self.source.mean

    @property
    def std(self) -> list[float]:
        return self.source.std

    @property
    def batch_size(self) -> int:
        return self.source.batch_size

    @property
    def eval_batch_size(self) -> int:
        return self.source.eval_batch_size

    @property
    def train_image(self) -> Any:
        return self.source.train_image

    @property
    def train_target(self) -> Tensor:
        return self.source.train_target

    @property
    def test_target(self) -> Tensor:
        return self.source.test_target

    def picture(self, index: int) -> Image.Image | None:
        """See ``LabelledDataModule.picture``."""
        return self.source.picture(index)

    def check_classes(self, stored: Sequence[str]) -> None:
        """See ``LabelledDataModule.check_classes``."""
        check_class_names(stored, self.class_names)

    def describe(self) -> dict[str, Any]:
        """See ``LabelledDataModule.describe``."""
        return {**self.source.describe(), "class_names": list(self.class_names)}

    def prepare_data(self) -> None:
        self.source.prepare_data()

    def train_dataloader(self) -> Any:
        return train_loader_of(self)

    def val_dataloader(self) -> BatchLoader | list[BatchLoader]:
        return self.loader("val") if len(self.val_indices) else []

    def test_dataloader(self) -> BatchLoader:
        return self.loader("test")
