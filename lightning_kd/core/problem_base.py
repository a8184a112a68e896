"""The interface of a kind of problem: outputs, targets, loss, metrics and predictions on disk."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.prediction_files import PredictionTable, PredictionWriter

__all__ = ["Problem"]


class Problem(ABC):
    """What a network predicts: one class for an image, several labels, a class for each pixel, or a kind of your own.

    A new kind of problem is one subclass, and one data module with an instance as ``problem``. The subclass defines
    the form of outputs and targets, the loss, the metrics and which one is monitored. Everything else has a default:
    logits are scores, probabilities and prediction at once, and a prediction is a row of ``predictions.csv``.

    Args:
        num_classes: number of classes, or of other quantities with one output each.

    Raises:
        ValueError: for a number that is not whole, or too small.
    """

    #: the kind in words, for messages
    kind = "a problem of its own"
    #: the metric by which ``best.ckpt`` is chosen, without ``val/``
    monitored = "loss"
    monitor_mode = "min"
    #: name of the mean of ``training_values``, without ``train/``
    training_metric = "score"
    #: smallest number of classes
    least = 1
    #: whether each sample has one class, an integer, so that samples can be drawn and split by class
    one_class = False
    #: whether ``update_metrics`` and ``predict`` use probabilities; if not, they get ``None``
    needs_probabilities = True

    def __init__(self, num_classes: int) -> None:
        remedy = "give the number of classes, or take the task Supervised if the data is of another kind"
        check_numbers(least=self.least, whole=True, remedy=remedy, num_classes=num_classes)
        self.num_classes: int = int(num_classes)

    @property
    def monitor(self) -> str:
        """The monitored metric's full name, such as ``val/acc``."""
        return f"val/{self.monitored}"

    @property
    def chance(self) -> float | None:
        """The ``training_metric`` of random guesses; ``None`` if it is not meaningful."""
        return None

    @property
    def chance_loss(self) -> float | None:
        """The loss of a uniform guess, above which a training has failed; ``None`` if there is none."""
        return None

    # -- outputs and targets -----------------------------------------------------------------------------------------

    @abstractmethod
    def logits(self, output: Any, image: Tensor, network: nn.Module, name: str = "") -> Tensor:
        """The logits in what ``network`` returned for ``image``.

        Args:
            output: see ``logits_of``.
            image: the images that it was given.
            network: the network, for the message.
            name: name of the network in the message. Default: its class.

        Raises:
            TypeError: if there are no logits.
            ValueError: if they have a wrong shape.
        """

    @abstractmethod
    def check_target(self, target: Tensor) -> None:
        """Check the targets of a batch. It is called for each batch on a CPU, for the first of a fit on a GPU.

        Raises:
            ValueError: for a wrong dtype, shape or value.
        """

    @abstractmethod
    def loss(self, logits: Tensor, target: Tensor, **options: Any) -> Tensor:
        """The loss of supervised training: a scalar, the mean over all labels that are known."""

    def loss_of_probabilities(self, probabilities: Tensor, target: Tensor) -> Tensor:
        """The same loss from ``probabilities``, for methods that predict with several networks."""
        return self.loss(probabilities, target)

    def count(self, target: Tensor) -> int | Tensor:
        """The number of labels that the loss is the mean of."""
        return len(target)

    # -- predictions -------------------------------------------------------------------------------------------------

    def probabilities(self, logits: Tensor) -> Tensor:
        """The probabilities, in the shape of ``logits``."""
        return logits

    def prediction(self, scores: Tensor) -> Tensor:
        """The prediction, from logits or other scores."""
        return scores

    def predict(self, scores: Tensor, probabilities: Tensor) -> dict[str, Tensor]:
        """The outputs of ``predict_step`` for a batch: a dict of tensors whose first dimension is ``B``."""
        return {"prediction": self.prediction(scores), "probabilities": probabilities}

    # -- metrics -----------------------------------------------------------------------------------------------------

    def training_values(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
        """A cheap metric of a training batch: a value for each label, and a bool mask of those that count or None."""
        return self.loss(logits, target).expand(len(target)), None

    @abstractmethod
    def metrics(self) -> dict[str, Metric]:
        """New evaluation metrics by name, without the loss, which is added."""

    def class_metrics(self) -> dict[str, Metric]:
        """New metrics of single classes, updated like those of ``metrics()``. Default: none."""
        return {}

    def curve_metrics(self) -> dict[str, Metric]:
        """New metrics for ``AccuracyCurve``, which plots them over the epochs. Default: ``metrics()``."""
        return self.metrics()

    def update_metrics(
        self, metrics: MetricCollection | Mapping[str, Metric], scores: Tensor, probabilities: Tensor, target: Tensor
    ) -> None:
        """Update ``metrics``, some of ``metrics()``, ``class_metrics()`` and ``curve_metrics()``, with a batch."""
        for metric in metrics.values():
            metric.update(scores, target)

    # -- on disk -----------------------------------------------------------------------------------------------------

    def columns(self, outputs: Mapping[str, Tensor], class_names: Sequence[str]) -> dict[str, list[Any]]:
        """The columns of ``predictions.csv`` after ``index`` and ``path``, from the outputs of ``predict``."""
        found: dict[str, list[Any]] = {}
        for name, values in outputs.items():
            if values.ndim == 1:
                found[name] = values.tolist()
            else:
                found |= {f"{name}_{k}": column.tolist() for k, column in enumerate(values.flatten(1).unbind(1))}
        return found

    def prediction_writer(self) -> PredictionWriter:
        """A new writer of predictions into a run folder."""
        return PredictionTable(self.columns)


def log_of(probabilities: Tensor) -> Tensor:
    """The logarithm of probabilities, finite where they are 0."""
    return probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()
