"""What a network is asked, and all that follows from it: outputs, targets, loss, metrics and predictions on disk."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from lightning_kd.core.calibration import CalibrationMetric
from lightning_kd.core.multilabel_metrics import MultiLabelMetric
from lightning_kd.core.outputs import class_logits, logits_of, pixel_logits
from lightning_kd.core.prediction_files import MaskFolder, PredictionTable, PredictionWriter
from lightning_kd.core.segmentation_metrics import SegmentationMetric

__all__ = ["MultiLabel", "Problem", "Segmentation", "SingleLabel"]


class Problem(ABC):
    """A kind of question. A new kind is one subclass and one data module that has it as ``problem``.

    A subclass says what outputs and targets look like, the loss, the metrics and which one is monitored. Everything
    else has a default: outputs are their own scores and prediction, and a prediction is a row of ``predictions.csv``.

    Args:
        num_classes: number of classes, or of whatever else the outputs have one number for.

    Raises:
        ValueError: where that is no whole number, or too small.
    """

    #: in words, for messages
    kind = "a problem of its own"
    #: the metric that ``best.ckpt`` is chosen by, without ``val/``
    monitored = "loss"
    monitor_mode = "min"
    #: what ``training_values`` are the mean of, without ``train/``
    training_metric = "score"
    #: the fewest classes
    least = 1

    def __init__(self, num_classes: int) -> None:
        if not isinstance(num_classes, int) or num_classes < self.least:
            raise ValueError(
                f"num_classes must be at least {self.least}, got {num_classes}: a data module must have num_classes"
            )
        self.num_classes = num_classes

    @property
    def monitor(self) -> str:
        """The monitored metric's full name, such as ``val/acc``."""
        return f"val/{self.monitored}"

    @property
    def chance(self) -> float | None:
        """What guessing reaches in ``training_metric``; ``None`` where that says nothing."""
        return None

    # -- outputs and targets -----------------------------------------------------------------------------------------

    @abstractmethod
    def logits(self, output: Any, image: Tensor, network: nn.Module, name: str = "") -> Tensor:
        """The logits in what ``network`` returned for ``image``.

        Args:
            output: see ``logits_of``.
            image: what it was given.
            network: for the message.
            name: what the message calls it. Default: its class.

        Raises:
            TypeError: where there are no logits.
            ValueError: where they have the wrong shape.
        """

    @abstractmethod
    def check_target(self, target: Tensor) -> None:
        """Look at the targets of one batch.

        Raises:
            ValueError: where dtype, shape or range are wrong.
        """

    @abstractmethod
    def loss(self, logits: Tensor, target: Tensor, **options: Any) -> Tensor:
        """The loss of a plain training: a scalar, the mean over all that has a label."""

    def loss_of_probabilities(self, probabilities: Tensor, target: Tensor) -> Tensor:
        """The same of probabilities, where several networks answer together."""
        return self.loss(_log(probabilities), target)

    def count(self, target: Tensor) -> int | Tensor:
        """How many labels the loss is the mean over."""
        return len(target)

    # -- answers -----------------------------------------------------------------------------------------------------

    def probabilities(self, logits: Tensor) -> Tensor:
        """Of each class, of the shape of ``logits``."""
        return logits

    def prediction(self, scores: Tensor) -> Tensor:
        """The answer itself, from logits or other scores."""
        return scores

    def predict(self, scores: Tensor, probabilities: Tensor) -> dict[str, Tensor]:
        """What ``predict`` keeps of each batch: tensors by name, first dimension ``B``."""
        return {"prediction": self.prediction(scores), "probabilities": probabilities}

    # -- metrics -----------------------------------------------------------------------------------------------------

    def training_values(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
        """A cheap measure of a training batch: a value for each label, and which count (bool; ``None``: all)."""
        return self.loss(logits, target).expand(len(target)), None

    @abstractmethod
    def metrics(self) -> dict[str, Metric]:
        """New evaluation metrics by name; the loss comes by itself."""

    def curve_metrics(self) -> dict[str, Metric]:
        """New metrics for a curve over the epochs."""
        return self.metrics()

    def update_metrics(
        self, metrics: MetricCollection | Mapping[str, Metric], scores: Tensor, probabilities: Tensor, target: Tensor
    ) -> None:
        """Take one batch in. ``metrics`` are some of ``metrics()`` or ``curve_metrics()``."""
        for metric in metrics.values():
            metric.update(scores, target)

    # -- on disk -----------------------------------------------------------------------------------------------------

    def columns(self, outputs: Mapping[str, Tensor], class_names: Sequence[str]) -> dict[str, list[Any]]:
        """The columns of ``predictions.csv`` after ``index`` and ``path``, from what ``predict`` gave."""
        found: dict[str, list[Any]] = {}
        for name, values in outputs.items():
            if values.ndim == 1:
                found[name] = values.tolist()
            else:
                found |= {f"{name}_{k}": column.tolist() for k, column in enumerate(values.flatten(1).unbind(1))}
        return found

    def prediction_writer(self) -> PredictionWriter:
        """What writes predictions into a run folder."""
        return PredictionTable(self.columns)


class SingleLabel(Problem):
    """One class an image (or row of features). Targets are int64 ``[B]``, outputs ``[B, C]``.

    Metrics: ``acc``, ``ece`` (15 bins) and, with more than 10 classes, ``acc5``.
    """

    kind = "one class an image (SingleLabel)"
    monitored, monitor_mode = "acc", "max"
    training_metric = "acc"
    least = 2

    @property
    def chance(self) -> float | None:
        return 1 / self.num_classes

    def logits(self, output: Any, image: Tensor, network: nn.Module, name: str = "") -> Tensor:
        return class_logits(network, output, self.num_classes, name)

    def check_target(self, target: Tensor) -> None:
        if target.ndim != 1 or target.dtype != torch.int64:
            raise ValueError(
                f"target must be int64 [B], a class for each image, got {target.dtype} {list(target.shape)}"
            )
        _check_range(target, 0, self.num_classes - 1)

    def loss(self, logits: Tensor, target: Tensor, **options: Any) -> Tensor:
        return F.cross_entropy(logits, target, **options)

    def loss_of_probabilities(self, probabilities: Tensor, target: Tensor) -> Tensor:
        return F.nll_loss(_log(probabilities), target)

    def probabilities(self, logits: Tensor) -> Tensor:
        return logits.softmax(1)

    def prediction(self, scores: Tensor) -> Tensor:
        return scores.argmax(1)

    def training_values(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
        return logits.argmax(1) == target, None

    def metrics(self) -> dict[str, Metric]:
        found: dict[str, Metric] = {
            "acc": MulticlassAccuracy(self.num_classes, average="micro"),
            "ece": MulticlassCalibrationError(self.num_classes, n_bins=15),
        }
        if self.num_classes > 10:
            found["acc5"] = MulticlassAccuracy(self.num_classes, average="micro", top_k=5)
        return found

    def curve_metrics(self) -> dict[str, Metric]:
        return {"calibration": CalibrationMetric()}

    def update_metrics(
        self, metrics: MetricCollection | Mapping[str, Metric], scores: Tensor, probabilities: Tensor, target: Tensor
    ) -> None:
        for metric in metrics.values():
            if isinstance(metric, CalibrationMetric):
                metric.update(scores, probabilities, target)
            else:
                metric.update(probabilities if isinstance(metric, MulticlassCalibrationError) else scores, target)

    def columns(self, outputs: Mapping[str, Tensor], class_names: Sequence[str]) -> dict[str, list[Any]]:
        predicted = outputs["prediction"].tolist()
        names = {"class_name": [class_names[k] for k in predicted]} if class_names else {}
        rest = {name: values for name, values in outputs.items() if name != "prediction"}
        return {"prediction": predicted, **names, **_renamed(super().columns(rest, class_names))}


class MultiLabel(Problem):
    """Several labels an image. Targets are float32 ``[B, C]`` of 1, 0 and -1 (not known), outputs ``[B, C]``.

    The loss is binary cross-entropy, the mean over all labels that are known. Metrics: ``map``, the mean over classes
    of the average precision (scikit-learn's definition), without classes that have no positive, which
    ``absent_classes`` counts; ``cf1`` and ``of1``, the F1 of mean precision and recall over classes and over all
    labels, of what has a probability of 0.5 or more.
    """

    kind = "several labels an image (MultiLabel)"
    monitored, monitor_mode = "map", "max"
    training_metric = "label_acc"

    def logits(self, output: Any, image: Tensor, network: nn.Module, name: str = "") -> Tensor:
        return class_logits(network, output, self.num_classes, name)

    def check_target(self, target: Tensor) -> None:
        if target.ndim != 2 or target.shape[1] != self.num_classes:
            raise ValueError(
                f"target must be [B, {self.num_classes}] of 1, 0 and -1 (not known), got {list(target.shape)}: one "
                "column a class"
            )
        if target.device.type == "cpu" and not ((target == 0) | (target == 1) | (target == -1)).all():
            raise ValueError(
                f"target must hold 1, 0 and -1 (not known), got values from {float(target.min())} to "
                f"{float(target.max())}: correct the labels"
            )

    def loss(self, logits: Tensor, target: Tensor, **options: Any) -> Tensor:
        known = target >= 0
        each = F.binary_cross_entropy_with_logits(logits, target.clamp(min=0).to(logits.dtype), reduction="none")
        return (each * known).sum() / known.sum().clamp(min=1)

    def loss_of_probabilities(self, probabilities: Tensor, target: Tensor) -> Tensor:
        return self.loss(_log(probabilities) - _log(1 - probabilities), target)

    def count(self, target: Tensor) -> int | Tensor:
        return (target >= 0).sum()

    def probabilities(self, logits: Tensor) -> Tensor:
        return logits.sigmoid()

    def prediction(self, scores: Tensor) -> Tensor:
        """Bool ``[B, C]``: the labels with a probability of 0.5 or more."""
        return scores >= 0

    def training_values(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.prediction(logits) == (target > 0), target >= 0

    def metrics(self) -> dict[str, Metric]:
        return {"labels": MultiLabelMetric(self.num_classes)}

    def update_metrics(
        self, metrics: MetricCollection | Mapping[str, Metric], scores: Tensor, probabilities: Tensor, target: Tensor
    ) -> None:
        for metric in metrics.values():
            metric.update(probabilities, target)

    def columns(self, outputs: Mapping[str, Tensor], class_names: Sequence[str]) -> dict[str, list[Any]]:
        names = list(class_names) or [str(k) for k in range(self.num_classes)]
        labels = ["|".join(names[k] for k in row.nonzero().flatten()) for row in outputs["prediction"]]
        return {"labels": labels, **_renamed(super().columns({"probabilities": outputs["probabilities"]}, names))}


class Segmentation(Problem):
    """A class for each pixel. Targets are int64 ``[B, H, W]``, -1 for ignored pixels, outputs ``[B, C, h, w]``.

    Outputs of another size are brought to that of the image (bilinear). The loss is cross-entropy, the mean over all
    pixels that are not ignored. Metrics: ``miou``, the mean intersection over union of the classes that occur in the
    targets or the predictions, and ``pixel_acc``.
    """

    kind = "a class for each pixel (Segmentation)"
    monitored, monitor_mode = "miou", "max"
    training_metric = "pixel_acc"
    least = 2

    def logits(self, output: Any, image: Tensor, network: nn.Module, name: str = "") -> Tensor:
        return pixel_logits(network, logits_of(output), self.num_classes, image.shape[-2:], name)

    def check_target(self, target: Tensor) -> None:
        if target.ndim != 3 or target.dtype != torch.int64:
            raise ValueError(
                f"target must be int64 [B, H, W], a class for each pixel, got {target.dtype} {list(target.shape)}"
            )
        _check_range(target, -1, self.num_classes - 1)

    def loss(self, logits: Tensor, target: Tensor, **options: Any) -> Tensor:
        total = F.cross_entropy(_resized(logits, target), target, ignore_index=-1, reduction="sum", **options)
        return total / self.count(target).clamp(min=1)

    def count(self, target: Tensor) -> Tensor:
        return (target >= 0).sum()

    def probabilities(self, logits: Tensor) -> Tensor:
        return logits.softmax(1)

    def prediction(self, scores: Tensor) -> Tensor:
        return scores.argmax(1)

    def predict(self, scores: Tensor, probabilities: Tensor) -> dict[str, Tensor]:
        """``prediction`` alone, uint8 ``[B, H, W]`` (int32 with more than 256 classes): probabilities are large."""
        return {"prediction": self.prediction(scores).to(torch.uint8 if self.num_classes <= 256 else torch.int32)}

    def training_values(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.prediction(_resized(logits, target)) == target, target >= 0

    def metrics(self) -> dict[str, Metric]:
        return {"pixels": SegmentationMetric(self.num_classes)}

    def update_metrics(
        self, metrics: MetricCollection | Mapping[str, Metric], scores: Tensor, probabilities: Tensor, target: Tensor
    ) -> None:
        prediction = self.prediction(_resized(scores, target))
        for metric in metrics.values():
            metric.update(prediction, target)

    def prediction_writer(self) -> PredictionWriter:
        return MaskFolder(self.num_classes)


def _log(probabilities: Tensor) -> Tensor:
    return probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()


def _resized(logits: Tensor, target: Tensor) -> Tensor:
    """``logits`` ``[B, C, h, w]`` of the size of ``target`` ``[B, H, W]``."""
    if logits.shape[-2:] == target.shape[-2:]:
        return logits
    return F.interpolate(logits, target.shape[-2:], mode="bilinear", align_corners=False)


def _check_range(target: Tensor, low: int, high: int) -> None:
    if target.device.type == "cpu" and target.numel():  # a GPU would have to wait
        least, most = int(target.min()), int(target.max())
        if least < low or most > high:
            raise ValueError(
                f"target must be between {low} and {high}, got {least} to {most}: correct labels or num_classes"
            )


def _renamed(columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {name.replace("probabilities_", "probability_"): values for name, values in columns.items()}
