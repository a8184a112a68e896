"""What a kind of problem has to say: outputs, targets, loss, metrics and predictions on disk."""

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
    #: whether each sample has one class, an integer, so that samples can be drawn and split by class
    one_class = False
    #: whether ``update_metrics`` and ``predict`` look at probabilities; else they get ``None``, and none are made
    needs_probabilities = True

    def __init__(self, num_classes: int) -> None:
        check_numbers(least=self.least, whole=True, num_classes=num_classes)
        self.num_classes: int = int(num_classes)

    @property
    def monitor(self) -> str:
        """The monitored metric's full name, such as ``val/acc``."""
        return f"val/{self.monitored}"

    @property
    def chance(self) -> float | None:
        """What guessing reaches in ``training_metric``; ``None`` where that says nothing."""
        return None

    @property
    def chance_loss(self) -> float | None:
        """The loss of guessing, above which a training has failed; ``None`` where there is no such thing."""
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
        """Look at the targets of one batch: of each on a CPU, of the first of a fit on a GPU, which would wait for it.

        Raises:
            ValueError: where dtype, shape or range are wrong.
        """

    @abstractmethod
    def loss(self, logits: Tensor, target: Tensor, **options: Any) -> Tensor:
        """The loss of a plain training: a scalar, the mean over all that has a label."""

    def loss_of_probabilities(self, probabilities: Tensor, target: Tensor) -> Tensor:
        """The same of ``probabilities``, where several networks answer together; by default these are the outputs."""
        return self.loss(probabilities, target)

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

    def class_metrics(self) -> dict[str, Metric]:
        """New metrics that tell of single classes, updated like those of ``metrics()``; none by default."""
        return {}

    def curve_metrics(self) -> dict[str, Metric]:
        """New metrics for a curve over the epochs."""
        return self.metrics()

    def update_metrics(
        self, metrics: MetricCollection | Mapping[str, Metric], scores: Tensor, probabilities: Tensor, target: Tensor
    ) -> None:
        """Take one batch in. ``metrics`` are some of ``metrics()``, ``class_metrics()`` or ``curve_metrics()``."""
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


def log_of(probabilities: Tensor) -> Tensor:
    """Their logarithm, finite where they are 0."""
    return probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()
