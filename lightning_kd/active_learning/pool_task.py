"""What the methods for open-set active learning share: a pool, scores for it, and a choice."""

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
    """A method that trains on the labelled part of a pool and says what to label next.

    One ``fit`` is one round. ``main_network`` is what is tested and reported, on known classes only.

    A subclass implements ``training_step``, ``select`` and, where the choice needs more than the probabilities of
    ``answer``, ``pool_scores``.

    Args:
        num_classes: number of known classes ``K``. From the command line it comes from the data module.
        input_shape: see ``Task``.
        warm_start: in ``lightning-kd active``, start each round from the weights that the one before ended with. By
            default every round starts from fresh weights.
        kwargs: ``optimizer``, ``lr_scheduler``, ``lr_interval``, ``channels_last``, ``compile`` of ``Task``.
    """

    #: whether a choice comes after the training; not in the last round of ``run_rounds``, where what only serves the
    #: choice need not be trained
    choice_follows = True
    #: the pool's scores are read by the query, not written
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
        """What the record of a pool calls the choice."""
        return type(self).__name__

    @property
    def pool(self) -> Any:
        """The ``OpenSetDataModule`` that the task trains on.

        Raises:
            ValueError: if it is another data module, or none.
        """
        data = getattr(self.trainer, "datamodule", None)
        if not hasattr(data, "unknown_indices"):
            raise ValueError(
                f"{type(self).__name__} needs a pool, got {type(data).__name__}: wrap your data module in "
                "OpenSetDataModule(source=...)"
            )
        return data

    def build_for(self, network: str | nn.Module, outputs: int, classifier: str | None = None) -> nn.Module:
        """One more network like ``network``, with ``outputs`` logits: by name, or a copy with a new classifier.

        ``classifier`` is the module path of the old one where it is not the last ``nn.Linear``.
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
        """Whether what is predicted is the pool, or a loader without a data module; new samples have no place in it."""
        data = getattr(self._trainer, "datamodule", None)
        return data is None or hasattr(data, "unknown_indices")

    def training_target(self, batch: Any) -> Tensor | None:
        target = super().training_target(batch)
        if target is None:
            return None
        # K is a queried unknown; -1 is unlabelled, from which BUAL learns without its label
        return target.where((target != self.num_classes) & (target != -1), 0)

    # -- scoring and choosing ----------------------------------------------------------------------------------------

    @property
    def needs_labelled(self) -> bool:
        """Whether the choice needs the labelled samples' scores too."""
        return False

    @property
    def asks_once(self) -> bool:
        """Whether all of the budget goes into one query, so that a second one is refused."""
        return False

    def pool_scores(self, image: Tensor, index: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """What the choice needs of some samples, in eval mode and without gradient.

        Args:
            image: ``[B, C, H, W]`` or ``[B, D]``.
            index: int64 ``[B]``, positions in the full training array.

        Returns:
            ``(probabilities, scores)``: float32 ``[B, K]`` over the known classes, and tensors by name, first
            dimension ``B``.
        """
        return self.scores_and_probabilities(image)[1], {}

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """``prediction``, ``probabilities`` and, where the batch has it, ``index``, as ``Task`` gives them, and the
        ``pool_scores``; of samples that are in no pool those alone that ``Task`` gives."""
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
        """The samples to label next, as ``Strategy.select`` says.

        Args:
            scores: what ``predict_step`` gave for ``pool.unlabelled``, gathered and sorted by index, on the CPU.
            pool: what is known of the pool.
            budget: how many.
            generator: the only source of random numbers.
        """
