"""Validation, test and prediction of a network, for any kind of problem."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lightning as L
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection

from lightning_kd.core.batch import Batch, as_batch
from lightning_kd.core.class_metrics import ConfusionMetric, are_unequal, class_sizes
from lightning_kd.core.kept_precision import KeptPrecision
from lightning_kd.core.problems import Problem, SingleLabel
from lightning_kd.core.starting_weights import weights_from_checkpoint

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["EvaluatedModule", "loss_metric"]


class EvaluatedModule(KeptPrecision, L.LightningModule):
    """A LightningModule that can validate, test and predict with its ``main_network``; ``Task`` adds the training.

    The metrics ``val/`` and ``test/`` are ``loss`` and those of the ``problem``, over all processes. They stay float32
    at every precision of the Trainer.
    """

    problem_class: type[Problem] = SingleLabel
    problem: Problem
    #: names of the outputs of ``predict_step`` that are written to disk. Default: all
    written_outputs: tuple[str, ...] | None = None
    #: ``(epoch, global_step)`` of the checkpoint that was loaded
    loaded_progress: tuple[int, int] | None = None

    def make_problem(self, num_classes: int) -> Problem:
        """The problem that the network solves, an instance of ``problem_class``."""
        return self.problem_class(num_classes)

    def set_problem(self, problem: Problem) -> None:
        """Set the problem and make its metrics; call it once, in ``__init__``."""
        self.problem = problem
        self.num_classes = problem.num_classes
        self.val_metrics = self._evaluation_metrics("val/")
        self.test_metrics = self._evaluation_metrics("test/")
        self.keep_precise("val_metrics", "test_metrics")

    @property
    def main_network(self) -> nn.Module:
        """The network that is validated, tested, used for predictions and exported."""
        raise AttributeError(f"{type(self).__name__} has no main_network: return the network that predicts")

    def format_image(self, image: Tensor) -> Tensor:
        """The images in the form that the networks take, such as a memory format."""
        return image

    @property
    def monitor(self) -> str:
        """Name of the metric by which ``best.ckpt`` is chosen."""
        return self.problem.monitor

    @property
    def monitor_mode(self) -> str:
        """``"max"`` if a larger value of ``monitor`` is better, else ``"min"``."""
        return self.problem.monitor_mode

    def _evaluation_metrics(self, prefix: str) -> MetricCollection:
        metrics: dict[str, Any] = {"loss": loss_metric(), **self.problem.metrics(), **self.problem.class_metrics()}
        return MetricCollection(metrics, prefix=prefix, compute_groups=False)

    def check_data(self, data: Any, has_targets: bool = True) -> None:
        """Raise if the data are for another kind of problem, have more classes than the task, or samples with another
        number of channels or features than its networks were built for.

        Args:
            data: a data module; one without ``problem`` is not checked.
            has_targets: whether targets are used; if not, the number of classes is not checked.

        Raises:
            ValueError: naming the task and the data module.
        """
        given = getattr(data, "problem", None)
        if not isinstance(given, Problem):
            return
        if not isinstance(given, type(self.problem)) and not isinstance(self.problem, type(given)):
            raise ValueError(
                f"{type(self).__name__} is for {self.problem.kind}, but {type(data).__name__} has {given.kind}: use "
                "a task for that, or other data"
            )
        shape, own = tuple(getattr(data, "input_shape", ())), tuple(getattr(self, "input_shape", ()))
        if shape and getattr(self, "_built_by_name", False) and shape[:1] != own[:1]:
            raise ValueError(
                f"input_shape={own} does not fit the samples {shape} of {type(data).__name__}: give input_shape={shape}"
            )
        if has_targets and given.num_classes > self.problem.num_classes:  # a network may have more classes
            raise ValueError(
                f"num_classes={self.problem.num_classes} is less than the {given.num_classes} classes of "
                f"{type(data).__name__}: give num_classes={given.num_classes}"
            )

    def check_target(self, target: Tensor, first: bool) -> None:
        """Check the targets of a batch: each on a CPU, on a GPU the ``first`` alone, since a check makes it wait.

        Raises:
            ValueError: if dtype, shape or values are wrong for the problem.
        """
        if first or target.device.type == "cpu":
            self.problem.check_target(target)

    def forward(self, image: Tensor) -> Tensor:
        """Logits of the main network, in the shape that the problem needs.

        Raises:
            ValueError: if the network returns another shape.
        """
        network = self.main_network
        return self.problem.logits(network(self.format_image(image)), image, network)

    def scores_and_probabilities(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """The scores that decide the prediction, and the probabilities, both float32, in the shape of the logits.

        By default the logits and the problem's probabilities of them. A method that predicts with several networks
        overrides this.
        """
        logits = self(image).float()
        return logits, self.problem.probabilities(logits)

    def _answer(self, image: Tensor) -> tuple[Tensor, Any]:
        if self._by_logits and not self.problem.needs_probabilities:
            return self(image).float(), None
        return self.scores_and_probabilities(image)

    @property
    def _by_logits(self) -> bool:
        return type(self).scores_and_probabilities is EvaluatedModule.scores_and_probabilities

    def update_metrics(self, metrics: MetricCollection, batch: Batch) -> None:
        """Update ``metrics``, the problem's and, if it is among them, ``loss``, with one batch."""
        scores, probabilities = self._answer(batch.image)
        found: dict[str, Any] = dict(metrics.items(keep_base=True))
        if (mean := found.pop("loss", None)) is not None:
            if self._by_logits:
                loss = self.problem.loss(scores, batch.target)
            else:
                loss = self.problem.loss_of_probabilities(probabilities, batch.target)
            count = self.problem.count(batch.target)
            mean.update(loss, count.float() if isinstance(count, Tensor) else count)
        self.problem.update_metrics(found, scores, probabilities, batch.target)

    def _evaluate(self, batch: Any, batch_idx: int, metrics: MetricCollection) -> None:
        batch = as_batch(batch)
        self.check_target(batch.target, first=batch_idx == 0)
        self.update_metrics(metrics, batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, batch_idx, self.val_metrics)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, batch_idx, self.test_metrics)

    def on_validation_epoch_start(self) -> None:
        # here, not at the end: states that are reset in inference mode, by validate(), cannot be updated by a later fit
        self._begin(self.val_metrics)

    def on_test_epoch_start(self) -> None:
        self._begin(self.test_metrics)

    def _begin(self, metrics: MetricCollection) -> None:
        metrics.reset()
        confusion = dict(metrics.items(keep_base=True)).get("confusion")
        if isinstance(confusion, ConfusionMetric):
            data = getattr(self.trainer, "datamodule", None)
            confusion.tells_macro = are_unequal(class_sizes(data, self.num_classes))

    @property
    def confusion(self) -> Tensor | None:
        """The confusion matrix of the latest test, int64 ``[C, C]``, samples by class and predicted class, or None."""
        return getattr(dict(self.test_metrics.items(keep_base=True)).get("confusion"), "table", None)

    def on_validation_epoch_end(self) -> None:
        self._log_metrics(self.val_metrics)

    def on_test_epoch_end(self) -> None:
        self._log_metrics(self.test_metrics)

    def _log_metrics(self, metrics: MetricCollection) -> None:
        values = metrics.compute()
        # metrics are synchronised already; the monitored one is shown in the progress bar
        shown = f"/{self.problem.monitored}"
        self.log_dict({k: v for k, v in values.items() if not k.endswith(shown)})
        self.log_dict({k: v for k, v in values.items() if k.endswith(shown)}, prog_bar=True)

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """The problem's outputs (``prediction``, ``probabilities``) and the samples' ``index``, if the batch has it."""
        batch = as_batch(batch)
        index = {} if batch.index is None else {"index": batch.index}
        return {**index, **self.problem.predict(*self._answer(batch.image))}

    # -- checkpoints -------------------------------------------------------------------------------------------------

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """Lightning's ``load_from_checkpoint``, but with ``weights_only=True`` by default, which runs no pickled code.

        A network that was given as a module is not in the checkpoint's hyperparameters: give it again. The file of
        weights that the training started from need not exist.
        """
        kwargs.setdefault("weights_only", True)
        with weights_from_checkpoint():
            return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        data: Any = getattr(self._trainer, "datamodule", None)
        if hasattr(data, "check_classes"):  # a clearer error than that of weights with other shapes
            data.check_classes(checkpoint.get("class_names", data.class_names))
        self.loaded_progress = (checkpoint["epoch"], checkpoint["global_step"])


def loss_metric() -> MeanMetric:
    """The mean of a loss over all labels; NaN if a batch's loss is NaN, which torchmetrics by default would skip."""
    return MeanMetric(nan_strategy=float("nan"))
