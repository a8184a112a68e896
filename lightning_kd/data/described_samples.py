"""New samples for a trained run, prepared as its checkpoint describes the training data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_kd.core import problems
from lightning_kd.data.array_files import Arrays
from lightning_kd.data.image_files import truncated_allowed
from lightning_kd.data.new_samples import files_to_predict, is_array_file, read_unlabelled
from lightning_kd.data.preparation import Preparation
from lightning_kd.data.sampling import BatchLoader, ShardedSampler
from lightning_kd.data.split_files import SplitFiles
from lightning_kd.data.streaming import ImageFiles, StreamingLoader

__all__ = ["DescribedSamples"]


class DescribedSamples(SplitFiles):
    """Files or arrays without labels, to be predicted by a run of any data module of this package.

    Images are resized to the network's input as in the run's evaluation. If the run was trained on arrays, arrays must
    have the same shape. ``lightning-kd predict --data.predict`` uses it for data modules that cannot read new samples
    themselves.

    Args:
        description: what the data module of the run returns from ``describe()``; checkpoints hold it as
            ``data_description``.
        predict: a folder, an image or a list of images, see ``files_to_predict``; or a ``.npy`` or ``.npz``, see
            ``read_unlabelled``.
        eval_batch_size: largest number of samples per step and process.
        num_workers: number of worker processes that decode images; 0 decodes in the main process.
        on_error: ``"skip"`` leaves out damaged image files, with a warning; ``"raise"`` raises an error for them.

    Raises:
        ValueError: for a kind of problem that is not of this package, and for samples of another shape.
        FileNotFoundError: where ``predict`` does not exist.
    """

    def __init__(
        self,
        description: dict[str, Any],
        predict: str,
        eval_batch_size: int = 256,
        num_workers: int = 0,
        on_error: Literal["raise", "skip"] = "raise",
    ) -> None:
        kind = getattr(problems, str(description.get("problem")), None)
        if kind is None:
            raise ValueError(
                f"the data of this run has a custom problem, {description.get('problem')!r}: give a data module that "
                "reads the new samples"
            )
        names = list(description["class_names"])
        self.preparation = Preparation(description, tuple(description["input_shape"]))
        super().__init__(
            class_names=names,
            input_shape=self.preparation.input_shape,
            mean=self.preparation.mean,
            std=self.preparation.std,
            eval_batch_size=eval_batch_size,
            problem=kind(len(names)),
            predict=predict,
        )
        self.num_workers = num_workers
        self.on_error = on_error
        self.truncated = self.preparation.truncated
        self.root = f"{predict}/truncated allowed" if self.truncated else str(predict)  # checked separately
        self.background = self.preparation.background
        self.image_range = self.preparation.image_range
        self._checked = set()

    def load_arrays(self) -> Arrays:
        raise ValueError(f"there are only the samples of predict={self.predict!r}: use the data module of the run")

    def load_new(self) -> list[str] | Tensor:
        given, shape = str(self.predict), self.input_shape
        if not is_array_file(given):
            if len(shape) == 1 or shape[0] not in (1, 3):
                raise ValueError(
                    f"samples of predict {given!r} are image files, but training samples have shape {shape}: give a "
                    ".npy or .npz of that shape"
                )
            return files_to_predict(given)
        found = read_unlabelled(given, "predict")
        if self.preparation.by_file and found.ndim == 4 and found.shape[1] in (1, 3, 4):
            images = found.permute(0, 2, 3, 1).numpy()
            return torch.stack([self.preparation.unit(image).mul(255).round().to(torch.uint8) for image in images])
        if tuple(found.shape[1:]) != shape:
            raise ValueError(
                f"samples of predict {given!r} have shape {tuple(found.shape[1:])}, but training samples have {shape}: "
                "give samples of that shape"
            )
        return found

    def _check(self, splits: Sequence[str]) -> None:
        with truncated_allowed(self.truncated):
            super()._check([split for split in splits if not isinstance(self._of(split, "image"), Tensor)])

    def _make_loader(self, source: str, sampler: ShardedSampler, views: str | Sequence[str]) -> BatchLoader:
        if isinstance(self.predict_image, Tensor):
            return super()._make_loader(source, sampler, views)
        files = ImageFiles(
            self.predict_image,
            self.predict_target,
            self.preparation,
            sampler.seed,
            self.background,
            self.image_range,
            self.truncated,
        )
        pinned = self._process()[2].type == "cuda"
        return StreamingLoader(files, sampler, num_workers=self.num_workers, pin_memory=pinned)
