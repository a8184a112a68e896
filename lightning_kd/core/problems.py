"""The kinds of problems: single-label and multi-label classification, and semantic segmentation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from lightning_kd.core.calibration import CalibrationMetric
from lightning_kd.core.class_metrics import MOST_CLASSES, ConfusionMetric
from lightning_kd.core.label_matrix import main_class
from lightning_kd.core.multilabel_metrics import MultiLabelMetric
from lightning_kd.core.outputs import class_logits, logits_of, pixel_logits, resized
from lightning_kd.core.prediction_files import MaskFolder, PredictionWriter
from lightning_kd.core.problem_base import Problem, log_of
from lightning_kd.core.segmentation_metrics import SegmentationMetric

__all__ = ["MultiLabel", "Problem", "Segmentation", "SingleLabel"]


class SingleLabel(Problem):
    """One class for each image (or feature row). Targets are int64 ``[B]``, logits ``[B, C]``.

    A sample without a label (-1) is an error; data modules leave such samples out of labelled training and evaluation.
    Metrics: ``acc``, ``ece`` (15 bins) and, with more than 10 classes, ``acc5``; if the largest class of the training
    set is more than 3 times the smallest, ``acc_macro``, the mean of the classes' accuracies.
    """

    kind = "one class an image (SingleLabel)"
    monitored, monitor_mode = "acc", "max"
    training_metric = "acc"
    least = 2
    one_class = True

    @property
    def chance(self) -> float | None:
        return 1 / self.num_classes

    @property
    def chance_loss(self) -> float | None:
        return math.log(self.num_classes)

    def logits(self, output: Any, image: Tensor, network: nn.Module, name: str = "") -> Tensor:
        return class_logits(network, output, self.num_classes, name)

    def check_target(self, target: Tensor) -> None:
        if target.ndim != 1 or target.dtype != torch.int64:
            column = target.ndim == 2 and target.shape[1] == 1
            remedy = (
                "give one class for each image, or take a task for another kind; a method with batches of its own "
                "returns the targets to check from training_target"
            )
            if (column or target.ndim == 1) and bool((target.float() % 1 == 0).all()):
                remedy = "take target" + ".squeeze(1)" * column + ".long()"
            raise ValueError(
                f"target must be int64 [B], a class for each image, got {target.dtype} {list(target.shape)}: {remedy}"
            )
        _check_range(target, 0, self.num_classes - 1)

    def loss(self, logits: Tensor, target: Tensor, **options: Any) -> Tensor:
        return F.cross_entropy(logits, target, **options)

    def loss_of_probabilities(self, probabilities: Tensor, target: Tensor) -> Tensor:
        return F.nll_loss(log_of(probabilities), target)

    def probabilities(self, logits: Tensor) -> Tensor:
        return logits.softmax(1)

    def prediction(self, scores: Tensor) -> Tensor:
        return scores.argmax(1)

    def training_values(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
        return logits.argmax(1) == main_class(target), None

    def metrics(self) -> dict[str, Metric]:
        found: dict[str, Metric] = {
            # their own checks of each batch would make a GPU wait; check_target has done them
            "acc": MulticlassAccuracy(self.num_classes, average="micro", validate_args=False),
            "ece": MulticlassCalibrationError(self.num_classes, n_bins=15, validate_args=False),
        }
        if self.num_classes > 10:
            found["acc5"] = MulticlassAccuracy(self.num_classes, average="micro", top_k=5, validate_args=False)
        return found

    def class_metrics(self) -> dict[str, Metric]:
        return {"confusion": ConfusionMetric(self.num_classes)} if self.num_classes <= MOST_CLASSES else {}

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
        known = len(class_names) == self.num_classes  # a network may have more classes than the data
        names = {"class_name": [class_names[k] for k in predicted]} if known else {}
        others = {name: value for name, value in outputs.items() if name not in ("prediction", "probabilities")}
        rest = super().columns({"probability": outputs["probabilities"], **others}, class_names)
        return {"prediction": predicted, **names, **rest}


class MultiLabel(Problem):
    """Several labels for each image. Targets are float32 ``[B, C]`` of 1, 0 and -1 (not known), logits ``[B, C]``.

    The loss is binary cross-entropy, the mean over all labels that are known. Metrics: ``map``, the mean over classes
    of the average precision (scikit-learn's definition), without classes that have no positive, whose number is
    ``absent_classes``; ``cf1`` and ``of1``, F1 of the mean precision and recall over classes and F1 over all labels,
    for labels with a probability of at least 0.5. Metrics are computed from logits, since probabilities near 1 are
    rounded to equal values.
    """

    kind = "several labels an image (MultiLabel)"
    monitored, monitor_mode = "map", "max"
    training_metric = "label_acc"

    @property
    def chance_loss(self) -> float | None:
        return math.log(2)

    def logits(self, output: Any, image: Tensor, network: nn.Module, name: str = "") -> Tensor:
        return class_logits(network, output, self.num_classes, name)

    def check_target(self, target: Tensor) -> None:
        if target.ndim != 2 or target.shape[1] != self.num_classes:
            raise ValueError(
                f"target must be [B, {self.num_classes}] of 1, 0 and -1 (not known), got {list(target.shape)}: give "
                "one column for each class"
            )
        wide = target.float()  # in uint8, 255 == -1 is True
        if not ((wide == 0) | (wide == 1) | (wide == -1)).all():
            raise ValueError(
                f"target must hold 1, 0 and -1 (not known), got values from {float(target.min())} to "
                f"{float(target.max())}: correct the labels"
            )

    def loss(self, logits: Tensor, target: Tensor, **options: Any) -> Tensor:
        if options:
            raise TypeError(f"the loss of several labels takes no {', '.join(options)}: leave it out")
        known = target >= 0
        each = F.binary_cross_entropy_with_logits(logits, target.clamp(min=0).to(logits.dtype), reduction="none")
        return (each * known).sum() / known.sum().clamp(min=1)

    def loss_of_probabilities(self, probabilities: Tensor, target: Tensor) -> Tensor:
        return self.loss(log_of(probabilities) - log_of(1 - probabilities), target)

    def count(self, target: Tensor) -> int | Tensor:
        return (target >= 0).sum()

    def probabilities(self, logits: Tensor) -> Tensor:
        return logits.sigmoid()

    def prediction(self, scores: Tensor) -> Tensor:
        """The predicted labels, bool ``[B, C]``, from logits: those with a probability of at least 0.5."""
        return scores >= 0

    def training_values(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.prediction(logits) == (target > 0), target >= 0

    def metrics(self) -> dict[str, Metric]:
        return {"labels": MultiLabelMetric(self.num_classes, threshold=0.0)}  # of logits

    def update_metrics(
        self, metrics: MetricCollection | Mapping[str, Metric], scores: Tensor, probabilities: Tensor, target: Tensor
    ) -> None:
        for metric in metrics.values():
            metric.update(scores, target)

    def columns(self, outputs: Mapping[str, Tensor], class_names: Sequence[str]) -> dict[str, list[Any]]:
        """``labels``, the names of the predicted labels joined by ``|`` (``\\|`` in a name), and the probabilities."""
        known = len(class_names) == self.num_classes
        names = (
            [name.replace("\\", r"\\").replace("|", r"\|") for name in class_names]
            if known
            else list(map(str, range(self.num_classes)))
        )
        labels = ["|".join(names[k] for k in row.nonzero().flatten()) for row in outputs["prediction"]]
        others = {name: value for name, value in outputs.items() if name not in ("prediction", "probabilities")}
        return {"labels": labels, **super().columns({"probability": outputs["probabilities"], **others}, class_names)}


class Segmentation(Problem):
    """A class for each pixel. Targets are int64 ``[B, H, W]``, -1 for ignored pixels, logits ``[B, C, h, w]``.

    Logits of another size are resized to that of the image (bilinear). The loss is cross-entropy, the mean over all
    pixels that are not ignored. Metrics: ``miou``, the mean intersection over union of the classes that occur in the
    targets or the predictions, and ``pixel_acc``, the share of pixels predicted correctly.

    Args:
        num_classes: ``C``.
        align_corners: how logits are resized, see ``resized``.
    """

    kind = "a class for each pixel (Segmentation)"
    monitored, monitor_mode = "miou", "max"
    training_metric = "pixel_acc"
    least = 2
    needs_probabilities = False  # they would need as much memory as the logits

    def __init__(self, num_classes: int, align_corners: bool = False) -> None:
        super().__init__(num_classes)
        self.align_corners = align_corners

    @property
    def chance_loss(self) -> float | None:
        return math.log(self.num_classes)

    def logits(self, output: Any, image: Tensor, network: nn.Module, name: str = "") -> Tensor:
        size = image.shape[-2:]
        return pixel_logits(network, logits_of(output), self.num_classes, size, name, self.align_corners)

    def check_target(self, target: Tensor) -> None:
        if target.ndim != 3 or target.dtype != torch.int64:
            column = target.ndim == 4 and target.shape[1] == 1
            raise ValueError(
                f"target must be int64 [B, H, W], a class for each pixel, got {target.dtype} {list(target.shape)}: "
                + ("take target" + ".squeeze(1)" * column + ".long()" if column or target.ndim == 3 else "give masks")
            )
        _check_range(target, -1, self.num_classes - 1)

    def loss(self, logits: Tensor, target: Tensor, **options: Any) -> Tensor:
        logits = self._resized(logits, target)
        total = F.cross_entropy(logits, target, ignore_index=-1, reduction="sum", **options)
        return total / self.count(target).clamp(min=1)

    def count(self, target: Tensor) -> Tensor:
        return (target >= 0).sum()

    def loss_of_probabilities(self, probabilities: Tensor, target: Tensor) -> Tensor:
        return self.loss(log_of(probabilities), target)

    def probabilities(self, logits: Tensor) -> Tensor:
        return logits.softmax(1)

    def prediction(self, scores: Tensor) -> Tensor:
        return scores.argmax(1)

    def predict(self, scores: Tensor, probabilities: Tensor) -> dict[str, Tensor]:
        """``prediction`` alone, uint8 ``[B, H, W]`` (int32 with more than 256 classes), without the probabilities."""
        return {"prediction": self.prediction(scores).to(torch.uint8 if self.num_classes <= 256 else torch.int32)}

    def training_values(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.prediction(self._resized(logits, target)) == target, target >= 0

    def metrics(self) -> dict[str, Metric]:
        return {"pixels": SegmentationMetric(self.num_classes)}

    def update_metrics(
        self, metrics: MetricCollection | Mapping[str, Metric], scores: Tensor, probabilities: Tensor, target: Tensor
    ) -> None:
        prediction = self.prediction(self._resized(scores, target))
        for metric in metrics.values():
            metric.update(prediction, target)

    def prediction_writer(self) -> PredictionWriter:
        return MaskFolder(self.num_classes)

    def _resized(self, logits: Tensor, target: Tensor) -> Tensor:
        """``logits`` ``[B, C, h, w]`` resized to the size of ``target`` ``[B, H, W]``."""
        return resized(logits, target.shape[-2:], self.align_corners)


def _check_range(target: Tensor, low: int, high: int) -> None:
    if not target.numel():
        return
    least, most = (int(value) for value in target.aminmax())
    if least >= low and most <= high:
        return
    remedy = "correct labels or num_classes"
    if (least, most) == (1, high + 1):
        remedy = "count classes from 0, not from 1"
    elif low == -1 and most == 255:
        remedy = "give ignored pixels as -1, not as 255"
    elif low == 0 and least == -1 and most <= high:
        remedy = "leave out samples without a label (-1)"
    raise ValueError(f"target must be between {low} and {high}, got {least} to {most}: {remedy}")
