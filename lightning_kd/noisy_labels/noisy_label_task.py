"""The base of the methods for noisy labels: label scores of the training set, their metrics, and the report."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.batch import Batch, as_batch
from lightning_kd.core.distributed import gather_by_index
from lightning_kd.core.fine_tuning import FineTunedTask
from lightning_kd.core.inference_pass import ordered_pass
from lightning_kd.core.label_page import write_page
from lightning_kd.core.losses import at_least_float32
from lightning_kd.core.sample_memories import SampleMemories
from lightning_kd.core.task import Task
from lightning_kd.core.two_pass_step import second_pass
from lightning_kd.noisy_labels.correction_page import correction_page
from lightning_kd.noisy_labels.label_scores import LabelScores, logit_margin, split_scaled, unit_scores

__all__ = ["NoisyLabelTask", "SingleNetworkTask"]


class NoisyLabelTask(SampleMemories, Task, ABC):
    """Base of methods that train on noisy labels and estimate which labels are wrong.

    The estimate is a clean probability of each training label: the probability that the label is right. Unless the
    method has its own, it is the posterior of the higher of two Gaussians that are fitted to the margins (logit of the
    given label minus the largest other logit).

    Logged each epoch: ``train/clean_fraction`` (share of labels that count as clean) and means and weights of the two
    Gaussians. If the data module knows the true labels, also ``train/clean_precision``, ``train/clean_recall``,
    ``train/clean_auc``, ``train/pure_ratio`` (share of clean labels among those that count as clean),
    ``train/memorised_wrong`` and ``train/fitted_clean`` (accuracy on the given labels of wrongly and of correctly
    labelled samples). True labels are used for nothing else.

    After ``fit`` the run folder holds ``noisy_labels.csv``: index, given label, predicted class, clean probability and
    margin of every training sample, those most probably wrong first. ``noisy_labels.html`` shows the first of them on a
    page where a person can correct them.

    Several processes: values of the samples are gathered by index, and label scores are computed once.

    Args:
        num_classes: see ``Task``.
        input_shape: see ``Task``.
        label_page: number of labels in ``noisy_labels.html``; 0 for no page.
        kwargs: ``optimizer``, ``lr_scheduler``, ``lr_interval``, ``channels_last``, ``compile`` of ``Task``.

    Raises:
        ValueError: if an argument is out of range.
    """

    needs_index = False

    def __init__(
        self, num_classes: int, *, input_shape: Sequence[int] = (3, 32, 32), label_page: int = 200, **kwargs: Any
    ) -> None:
        super().__init__(num_classes, input_shape=input_shape, **kwargs)
        check_numbers(least=0, whole=True, remedy="give 0 for no page", label_page=label_page)
        self.label_page = label_page
        self._cached_scores: tuple[int, LabelScores] | None = None
        self._seen: dict[int, list[tuple[Tensor, ...]]] = {}

    def on_train_start(self) -> None:
        super().on_train_start()
        self._cached_scores = None  # a second fit may use other labels

    # -- label scores ------------------------------------------------------------------------------------------------

    def over_training_set(self, measure: Callable[[Batch], Sequence[Tensor]]) -> tuple[Tensor, ...]:
        """Apply ``measure`` to every training sample, in eval mode and without augmentation.

        All processes must call it together.

        Args:
            measure: function from a batch on the device to tensors ``[B, ...]``.

        Returns:
            ``(index, given, clean, *measured)`` of all processes, sorted by index, on the CPU; ``clean`` is -1 where
                the true label is unknown.
        """

        def with_labels(batch: Batch) -> tuple[Tensor, ...]:
            clean = batch.extras.get("clean_target", torch.full_like(batch.target, -1))
            return (batch.target, clean, *measure(batch))

        return ordered_pass(self, self.data.loader("train"), with_labels)

    def label_scores(self) -> LabelScores:
        """Label scores of the current network, from one pass over the training set.

        All processes must call it together. The result is cached until the next training step.
        """
        if self._cached_scores is None or self._cached_scores[0] != self.trainer.global_step:
            self._cached_scores = (self.trainer.global_step, self.score_training_set())
        return self._cached_scores[1]

    def score_training_set(self) -> LabelScores:
        """Compute ``label_scores``; by default from the margins of the predictions."""

        def measure(batch: Batch) -> tuple[Tensor, Tensor]:
            scores, _ = self.scores_and_probabilities(batch.image)
            return logit_margin(scores, batch.target), scores.argmax(1)

        index, given, clean, margin, predicted = self.over_training_set(measure)
        return self.score_labels(index, given, clean, margin, predicted)

    def score_labels(
        self, index: Tensor, given: Tensor, clean: Tensor, margin: Tensor, predicted: Tensor
    ) -> LabelScores:
        """Label scores from margins; ``clean`` is -1 where the true label is unknown."""
        unit = unit_scores(margin)
        probability, mixture = split_scaled(unit)
        known = clean if bool((clean >= 0).all()) else None
        return LabelScores(index, given, predicted, margin, unit, probability, mixture, known)

    def record_batch(self, batch: Batch, logits: Tensor, network: int = 0) -> None:
        """Store margins and predictions of a training batch for the label scores that are logged after the epoch.

        Each ``network`` has its own label scores.
        """
        if batch.index is not None and not second_pass():
            with torch.no_grad():
                clean = batch.extras.get("clean_target", torch.full_like(batch.target, -1))
                margin, predicted = logit_margin(logits, batch.target), logits.argmax(1)
                seen = self._seen.setdefault(network, [])
                seen.append((batch.index, batch.target, clean, margin, predicted))

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self._seen.clear()

    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        if self._seen:
            parts = [[torch.cat(column) for column in zip(*seen, strict=True)] for seen in self._seen.values()]
            self._seen.clear()
            self.log_scores(*(self.score_labels(*gather_by_index(*columns)) for columns in parts))

    def log_scores(self, *scores: LabelScores, without: Sequence[str] = ()) -> None:
        """Log the metrics of label scores except ``without``; the mean if there are several, one per network."""
        every = [s.metrics() for s in scores]
        names = [name for name in every[0] if name not in without and all(name in values for values in every)]
        self.log_dict({f"train/{name}": sum(values[name] for values in every) / len(every) for name in names})

    def write_results(self, folder: Path) -> None:
        data: Any = getattr(self.trainer, "datamodule", None)
        if not hasattr(data, "train_indices"):
            return  # a plain loader has no order of the samples
        scores = self.label_scores()
        if self.trainer.is_global_zero:
            files = data.train_image if isinstance(data.train_image, list) else None
            scores.write(folder / "noisy_labels.csv", files)
            if self.label_page:
                write_page(folder / "noisy_labels.html", lambda: correction_page(scores, data, self.label_page))


class SingleNetworkTask(NoisyLabelTask, FineTunedTask, ABC):
    """Base of methods that train one network on noisy labels with their own loss.

    Your method is a subclass with one method::

        class Mine(SingleNetworkTask):
            def noisy_loss(self, logits, batch):
                return my_loss(logits, batch.target)

    The label scores logged each epoch come from the training steps themselves (margins in train mode, on augmented
    images), at no cost; those in ``noisy_labels.csv`` come from a pass after training.

    Args:
        network: name of a network (``lightning-kd list``) or any ``nn.Module`` that returns logits ``[B, C]``.
        num_classes: see ``Task``.
        input_shape: see ``Task``.
        weights: checkpoint or ``state_dict`` file to start from; ``"default"`` for the published weights of a ``timm/``
            or ``torchvision/`` network. Default: train from scratch.
        kwargs: ``new_classifier``, ``freeze``, ``backbone_lr`` of ``FineTunedTask``; ``optimizer`` (default: that of
            ``Task``, with weights that of ``optimizer_for``), ``lr_scheduler``, ``lr_interval``, ``channels_last``,
            ``compile`` of ``Task``.
    """

    plain_default = True

    def __init__(
        self,
        network: str | nn.Module,
        num_classes: int,
        *,
        input_shape: Sequence[int] = (3, 32, 32),
        weights: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_classes, input_shape=input_shape, **kwargs)
        self.network = self.build_to_train(network, weights)

    @property
    def main_network(self) -> nn.Module:
        return self.network

    @abstractmethod
    def noisy_loss(self, logits: Tensor, batch: Batch) -> Tensor | dict[str, Tensor]:
        """The loss of a batch: a scalar, or its terms by name.

        Args:
            logits: float32 ``[B, C]``, with graph.
            batch: the batch; ``target`` are the given labels.
        """

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch = as_batch(batch)
        (logits,) = at_least_float32(self(batch.image))
        loss = self.noisy_loss(logits, batch)
        self.record_batch(batch, logits)
        return self.step_loss(loss if isinstance(loss, dict) else {"loss": loss}, logits, batch.target)
