"""What a network says, measured and kept: validation, test and predict of any kind of problem."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lightning as L
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection

from lightning_kd.core.batch import as_batch
from lightning_kd.core.problems import Problem, SingleLabel

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["EvaluatedModule"]


class EvaluatedModule(L.LightningModule):
    """A LightningModule whose ``main_network`` answers its ``problem``; everything but the training of a task.

    ``val/`` and ``test/`` metrics are ``loss`` and those of the problem, of all processes together.
    """

    problem_class: type[Problem] = SingleLabel
    problem: Problem
    #: epoch and steps of the checkpoint that was loaded
    loaded_progress: tuple[int, int] | None = None

    def make_problem(self, num_classes: int) -> Problem:
        """What is asked of the network."""
        return self.problem_class(num_classes)

    def set_problem(self, problem: Problem) -> None:
        """Say what is asked of the network, once, in ``__init__``."""
        self.problem = problem
        self.num_classes = problem.num_classes
        self.val_metrics = self._evaluation_metrics("val/")
        self.test_metrics = self._evaluation_metrics("test/")

    @property
    def main_network(self) -> nn.Module:
        """The network that is tested, used for predictions and exported."""
        raise AttributeError(f"{type(self).__name__} names no main_network: return the network that answers")

    def format_image(self, image: Tensor) -> Tensor:
        """The image as the networks want it."""
        return image

    @property
    def monitor(self) -> str:
        """The metric that ``best.ckpt`` is chosen by."""
        return self.problem.monitor

    @property
    def monitor_mode(self) -> str:
        """``"max"`` or ``"min"``."""
        return self.problem.monitor_mode

    def _evaluation_metrics(self, prefix: str) -> MetricCollection:
        metrics: dict[str, Any] = {"loss": MeanMetric(), **self.problem.metrics()}
        return MetricCollection(metrics, prefix=prefix, compute_groups=False)

    def check_data(self, data: Any) -> None:
        """Refuse data of another kind than the task is for.

        Raises:
            ValueError: naming both.
        """
        given = getattr(data, "problem", None)
        if isinstance(given, Problem) and not isinstance(given, type(self.problem)):
            raise ValueError(
                f"{type(self).__name__} is for {self.problem.kind}, but {type(data).__name__} has {given.kind}: take "
                "a task for that, or other data"
            )

    def forward(self, image: Tensor) -> Tensor:
        """Logits of the main network, as the problem wants them.

        Raises:
            ValueError: if the network gives anything else.
        """
        network = self.main_network
        return self.problem.logits(network(self.format_image(image)), image, network)

    def scores_and_probabilities(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """What is evaluated: the scores that decide the prediction, and probabilities, both float32.

        By default the logits and what the problem makes of them. A method whose networks answer together overrides it.
        """
        logits = self(image).float()
        return logits, self.problem.probabilities(logits)

    def _evaluate(self, batch: Any, batch_idx: int, metrics: MetricCollection) -> None:
        batch = as_batch(batch)
        if batch_idx == 0:
            self.problem.check_target(batch.target)
        scores, probabilities = self.scores_and_probabilities(batch.image)
        if type(self).scores_and_probabilities is EvaluatedModule.scores_and_probabilities:
            loss = self.problem.loss(scores, batch.target)
        else:
            loss = self.problem.loss_of_probabilities(probabilities, batch.target)
        found = dict(metrics.items(keep_base=True))
        found.pop("loss").update(loss, self.problem.count(batch.target))
        self.problem.update_metrics(found, scores, probabilities, batch.target)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, batch_idx, self.val_metrics)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, batch_idx, self.test_metrics)

    def on_validation_epoch_start(self) -> None:
        # here, not at the end: what validate() resets in inference mode, a later fit could not update
        self.val_metrics.reset()

    def on_test_epoch_start(self) -> None:
        self.test_metrics.reset()

    def on_validation_epoch_end(self) -> None:
        self._log_metrics(self.val_metrics)

    def on_test_epoch_end(self) -> None:
        self._log_metrics(self.test_metrics)

    def _log_metrics(self, metrics: MetricCollection) -> None:
        values = metrics.compute()
        # metrics are synchronised already; one is worth a place in the bar
        shown = f"/{self.problem.monitored}"
        self.log_dict({k: v for k, v in values.items() if not k.endswith(shown)})
        self.log_dict({k: v for k, v in values.items() if k.endswith(shown)}, prog_bar=True)

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """What the problem keeps of a prediction (``prediction``, ``probabilities``) and the ``index``, if known."""
        batch = as_batch(batch)
        index = {} if batch.index is None else {"index": batch.index}
        return {**index, **self.problem.predict(*self.scores_and_probabilities(batch.image))}

    # -- checkpoints -------------------------------------------------------------------------------------------------

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """Lightning's, with ``weights_only=True`` unless said otherwise: nothing but tensors and plain values is read.

        A network that was given as a module is not in the checkpoint's hyperparameters: give it again.
        """
        kwargs.setdefault("weights_only", True)
        return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.loaded_progress = (checkpoint["epoch"], checkpoint["global_step"])
