"""Predicting images in any form with a trained run, from Python."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.task import Task
from lightning_kd.data.new_samples import files_to_predict, is_array_file, read_unlabelled
from lightning_kd.data.preparation import Preparation
from lightning_kd.deploy.trained_run import load_trained, test_images

__all__ = ["Predictions", "Predictor", "load"]


@dataclass
class Predictions:
    """The predictions for ``N`` samples, on the CPU.

    Attributes:
        prediction: the class of each sample, int64 ``[N]``; for several labels bool ``[N, C]``; masks ``[N, H, W]``.
        names: the class name of each sample; for several labels a list of names each; ``None`` for masks.
        probabilities: float32 ``[N, C]``; ``None`` for masks.
        paths: the image files; ``None`` if the samples were not all given as files.
    """

    prediction: Tensor
    names: list[Any] | None
    probabilities: Tensor | None
    paths: list[str] | None = None

    def __len__(self) -> int:
        return len(self.prediction)


class Predictor:
    """A trained run that predicts; made by ``load``.

    Attributes:
        task: the method, in eval mode.
        class_names: names of the classes that it was trained on.
        input_shape: shape of an image ``(C, H, W)``, or of a feature row ``(D,)``.
        mean: mean of each channel (of values from 0 to 1) or feature, which is subtracted.
        std: standard deviation of each channel or feature, by which it is divided.
        checkpoint: the file of the weights.
    """

    def __init__(self, task: Task, description: dict[str, Any], checkpoint: Path) -> None:
        self.task = task
        self.checkpoint = checkpoint
        self.input_shape = tuple(description.get("input_shape") or task.input_shape)
        names = description.get("class_names") or ()
        known = len(names) == task.num_classes
        self.class_names: list[str] = list(names) if known else [str(k) for k in range(task.num_classes)]
        self._prepared = Preparation(description, self.input_shape)
        self.mean, self.std = self._prepared.mean, self._prepared.std

    @property
    def network(self) -> nn.Module:
        """The plain network, from normalised images (see ``prepare``) to logits."""
        return self.task.main_network

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.task.parameters()), torch.device("cpu"))

    def to(self, device: str | torch.device) -> Predictor:
        """Move the networks to ``device``, in place; returns the predictor itself."""
        self.task.to(device)
        return self

    def predict(self, images: Any, batch_size: int = 64) -> Predictions:
        """Predict one image or several.

        Args:
            images: one of these, or a list of them:

                - a path of an image; given alone, also of a folder, of a list (see ``files_to_predict``), or of a
                  ``.npy`` or ``.npz`` (see ``read_unlabelled``);
                - a PIL image;
                - an array ``[H, W, C]`` or ``[H, W]``, uint8 or float from 0 to 1; given alone, also ``[N, H, W, C]``,
                  and ``[N, H, W]`` for a run of grey images. Images of these three forms are resized as in evaluation;
                - a tensor ``[C, H, W]`` of the size of the network, uint8 or float from 0 to 1, not normalised; given
                  alone, also ``[N, C, H, W]``. Features are floats ``[D]`` or ``[N, D]``, as tensor or array.
            batch_size: number of images in a forward pass.

        Raises:
            ValueError: if a file cannot be read, and for images of another shape or dtype.
            TypeError: for anything else.
        """
        check_numbers(least=1, whole=True, batch_size=batch_size)
        samples, paths = self._samples(images)
        parts: list[dict[str, Tensor]] = []
        with torch.inference_mode():
            for start in range(0, len(samples), batch_size):
                batch = torch.stack([self._prepared(one) for one in samples[start : start + batch_size]])
                scores, probabilities = self.task.scores_and_probabilities(batch.to(self.device))
                found = self.task.problem.predict(scores, probabilities)
                parts.append({name: value.cpu() for name, value in found.items()})
        columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        prediction = columns["prediction"]
        return Predictions(prediction, self._names(prediction), columns.get("probabilities"), paths)

    def prepare(self, images: Any) -> Tensor:
        """The input of ``network`` for the images of ``predict``: normalised float32 ``[N, C, H, W]``, on the CPU."""
        return torch.stack([self._prepared(one) for one in self._samples(images)[0]])

    def images_to_compare(self, images: Any, count: int) -> tuple[Tensor, str | None]:
        """At most ``count`` samples in the form of ``prepare``, but not normalised, and a description of them.

        Args:
            images: see ``predict``. ``None``: the test set of the run, or random noise if its files do not exist.
            count: largest number of samples.

        Returns:
            ``(samples, description)``; the description is ``None`` for noise.
        """
        if images is not None:
            samples, _ = self._samples(images)
            return torch.stack([self._prepared.unit(one) for one in samples[:count]]), str(images)
        found = test_images(self.checkpoint, count)
        if found is not None:
            return found
        return torch.rand(count, *self.input_shape, generator=torch.Generator().manual_seed(0)), None

    def _names(self, prediction: Tensor) -> list[Any] | None:
        if prediction.ndim == 1 and not prediction.is_floating_point():
            return [self.class_names[k] for k in prediction.tolist()]
        if prediction.ndim == 2 and prediction.dtype == torch.bool:
            return [[self.class_names[k] for k in row.nonzero().flatten().tolist()] for row in prediction]
        return None

    def _in_array(self, images: np.ndarray | Tensor) -> Sequence[Any]:
        """The samples in one array or tensor."""
        if not images.ndim or not len(images):
            raise ValueError(f"images is empty, got an array of shape {tuple(images.shape)}: give one image at least")
        grey = self.input_shape[0] == 1 and isinstance(images, np.ndarray) and len(self.input_shape) == 3
        if grey and images.ndim == 3 and images.shape[2] not in (1, 3, 4):
            return list(images)  # [N, H, W]
        return images if images.ndim == len(self.input_shape) + 1 else [images]  # type: ignore[return-value]

    def _samples(self, images: Any) -> tuple[Sequence[Any], list[str] | None]:
        """``(samples, paths)``: the single samples, and their paths if all are files, else ``None``."""
        if isinstance(images, str | Path):
            if is_array_file(str(images)):
                found = read_unlabelled(str(images), "images")
                return self._in_array(found.permute(0, 2, 3, 1).numpy() if found.ndim == 4 else found), None
            files = files_to_predict(str(images), "images")
            return files, files
        if isinstance(images, Image.Image):
            return [images], None
        if isinstance(images, np.ndarray | Tensor):
            return self._in_array(images), None
        if not isinstance(images, Iterable):
            raise TypeError(
                f"images must be a path, a PIL image, an array, a tensor, or a list of them, got "
                f"{type(images).__name__}: give one of these"
            )
        samples = list(images)
        if not samples:
            raise ValueError("images is empty: give one image at least")
        paths = [str(one) for one in samples if isinstance(one, str | Path)]
        return samples, paths if len(paths) == len(samples) else None


def load(run: str | Path, device: str | torch.device | None = None) -> Predictor:
    """Load a trained run for predictions. The training data need not exist.

    ::

        predictor = lightning_kd.load("runs/photos")
        found = predictor.predict(["a.jpg", "b.jpg"])
        print(found.names, found.probabilities.max(1).values)

    Args:
        run: a run folder, of which ``best.ckpt`` is loaded, or ``last.ckpt`` if there is no best; or a checkpoint in a
            run folder.
        device: a device such as ``"cpu"`` or ``"cuda:1"``. Default: a GPU if there is one.

    Raises:
        FileNotFoundError: if there is no checkpoint, or no ``config.yaml`` of its run.
        ValueError: if one is damaged, or the two do not fit.
    """
    predictor = Predictor(*load_trained(run))
    return predictor.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
