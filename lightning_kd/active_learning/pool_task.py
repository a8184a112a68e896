"""The base class of the methods for open-set active learning: a pool, scores of its samples, and a query."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from lightning_kd.core.batch import as_batch
from lightning_kd.core.feature_hooks import find_classifier
from lightning_kd.core.task import Task
from lightning_kd.pool import PoolView, Query

__all__ = ["PoolTask"]


class PoolTask(Task, ABC):
    """A method that trains on the labelled part of a pool and chooses which samples to label next.

    One ``fit`` is one round. ``main_network`` is the network that is tested and reported, on known classes only.

    A subclass implements ``training_step``, ``select`` and, if ``select`` needs more than probabilities,
    ``pool_scores``.

    Args:
        num_classes: number of known classes ``K``. From the command line it comes from the data module.
        input_shape: see ``Task``.
        warm_start: in ``lightning-kd active``, start each round from the last weights of the round before. Default:
            every round starts from new weights.
        kwargs: ``optimizer``, ``lr_scheduler``, ``lr_interval``, ``channels_last``, ``compile`` of ``Task``.
    """

    #: whether a query follows the training. False in the last round of ``run_rounds``: networks that only serve the
    #: query need not be trained then
    query_follows = True
    #: outputs of ``predict_step`` that go into ``predictions.csv``; the scores are for the query alone
    written_outputs = ("prediction", "probabilities")

    def __init__(
        self,
        num_classes: int,
        *,
        input_shape: Sequence[int] = (3, 32, 32),
        warm_start: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_classes, input_shape=input_shape, **kwargs)
        self.warm_start = warm_start

    @property
    def strategy_name(self) -> str:
        """Name of the strategy in ``pool.json``; default: the name of the class."""
        return type(self).__name__

    @property
    def pool(self) -> Any:
        """The ``OpenSetDataModule`` that the task trains on.

        Raises:
            ValueError: if the Trainer has another data module, or none.
        """
        data = getattr(self.trainer, "datamodule", None)
        if not hasattr(data, "unknown_indices"):
            raise ValueError(
                f"{type(self).__name__} needs a pool, got {type(data).__name__}: wrap your data module in "
                "OpenSetDataModule(source=...)"
            )
        return data

    def build_for(self, network: str | nn.Module, outputs: int, classifier: str | None = None) -> nn.Module:
        """Another network of the same architecture with ``outputs`` logits.

        Args:
            network: a network's name, from which one is built; or a module, which is copied with a new classifier.
            outputs: number of logits.
            classifier: module path of the module's classifier. Default: the last ``nn.Linear``.
        """
        if isinstance(network, str):
            return self.build(network, outputs=outputs)
        other = copy.deepcopy(network)
        path, old = find_classifier(other, classifier)
        parent, _, name = path.rpartition(".")
        setattr(other.get_submodule(parent), name, nn.Linear(old.in_features, outputs, bias=old.bias is not None))
        return self.build(other)

    @property
    def predicts_pool(self) -> bool:
        """Whether ``trainer.predict`` runs over the pool, or a loader without a data module; False for new images."""
        data = getattr(self._trainer, "datamodule", None)
        return data is None or hasattr(data, "unknown_indices")

    def training_target(self, batch: Any) -> Tensor | None:
        target = super().training_target(batch)
        if target is None:
            return None
        # neither K (answered "unknown") nor -1 (unlabelled, as in BUAL's subset) is a class out of range
        return target.where((target != self.num_classes) & (target != -1), 0)

    # -- scoring and choosing ----------------------------------------------------------------------------------------

    @property
    def needs_labelled(self) -> bool:
        """Whether ``select`` also needs the scores of the labelled samples of known classes."""
        return False

    @property
    def single_query(self) -> bool:
        """Whether the whole budget goes into one query, so that a second query is refused."""
        return False

    def pool_scores(self, image: Tensor, index: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """What ``select`` needs of a batch of samples; called in eval mode and without gradient.

        Args:
            image: ``[B, C, H, W]`` or ``[B, D]``.
            index: int64 ``[B]``, positions in the full training array, or ``None``.

        Returns:
            ``(probabilities, scores)``: float32 ``[B, K]`` over the known classes, and a dict of tensors whose first
            dimension is ``B``.
        """
        return self.scores_and_probabilities(image)[1], {}

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """The outputs of ``Task`` (``prediction``, ``probabilities`` and, if the batch has it, ``index``) and, for
        samples of the pool, the ``pool_scores``."""
        if not self.predicts_pool:
            return super().predict_step(batch, batch_idx)
        batch = as_batch(batch)
        probabilities, scores = self.pool_scores(batch.image, batch.index)
        index = {} if batch.index is None else {"index": batch.index}
        return {**index, "prediction": probabilities.argmax(1), "probabilities": probabilities, **scores}

    @abstractmethod
    def select(
        self, scores: Mapping[str, Tensor], pool: PoolView, budget: int, generator: np.random.Generator
    ) -> Query | Tensor | np.ndarray:
        """Choose the samples to label next, see ``Strategy.select``.

        Args:
            scores: the outputs of ``predict_step`` for ``pool.unlabelled``, gathered and sorted by index, on the CPU.
            pool: what is known of the pool.
            budget: number of samples to choose.
            generator: the only source of random numbers.

        Returns:
            A ``Query``, or the indices alone, int64 ``[budget]``, the best first.
        """
