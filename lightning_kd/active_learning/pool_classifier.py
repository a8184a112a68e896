"""Active learning with one classifier and a query strategy of the user's choice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_kd.active_learning.baselines import STRATEGIES
from lightning_kd.active_learning.pool_task import PoolTask
from lightning_kd.active_learning.representations import open_representation
from lightning_kd.active_learning.strategies import Strategy
from lightning_kd.core.batch import as_batch
from lightning_kd.core.feature_hooks import penultimate_tap
from lightning_kd.core.fine_tuning import FineTunedTask
from lightning_kd.core.losses import at_least_float32
from lightning_kd.pool import PoolView, Query

__all__ = ["PoolClassifier"]

# strategies that take feature_networks; random ignores them, so that a comparison needs to change its name alone
BY_FEATURES = ("lewis", "k_center", "random")


class PoolClassifier(PoolTask, FineTunedTask):
    """Active learning with one classifier: cross-entropy on the labelled samples, and a strategy that makes the query.

    Use it for the classic strategies (random, least confidence, margin, entropy, certainty, k-center, BADGE, Lewis
    weights) or for a ``Strategy`` of your own. The network learns the labelled samples of known classes. Samples whose
    answer is "unknown" leave the pool and are not trained on.

    ``predict_step`` gives ``logits`` (float32 ``[B, K]``) besides the probabilities and, if the strategy needs it,
    ``feature`` (``[B, D]``, float32 or wider), the input of the network's classifier.

    Several processes: ordinary DDP; the strategy sees the gathered scores of the whole pool.

    Args:
        network: a network's name (``lightning-kd list``) or any ``nn.Module`` that gives logits ``[B, K]``.
        num_classes: number of known classes ``K``. From the command line it comes from the data module.
        input_shape: see ``Task``.
        strategy: ``"random"``, ``"least_confidence"``, ``"margin"``, ``"entropy"``, ``"certainty"``, ``"k_center"``,
            ``"badge"``, ``"lewis"``, or a ``Strategy`` object. An object is not stored in checkpoints: give it to
            ``load_from_checkpoint`` again.
        weights: checkpoint or ``state_dict`` file to start from; ``"default"`` for the published weights of a ``timm/``
            or ``torchvision/`` network. Default: train from scratch.
        classifier: module path of the layer whose input is the feature. Default: the last ``nn.Linear``.
        feature_networks: files whose features ``"lewis"`` and ``"k_center"`` use instead of those of ``network``:
            checkpoints of ``lightning-kd fit``, or stored features, an ``.npy`` ``[N, D]`` for the full training array
            or an ``.npz`` with ``feature`` ``[n, D]`` and ``index`` ``[n]``. They are read at the start of a fit or a
            query.
        kwargs: ``new_classifier``, ``freeze``, ``backbone_lr`` of ``FineTunedTask``; ``warm_start`` of ``PoolTask``;
            ``optimizer`` (default: that of ``Task``, with weights that of ``optimizer_for``), ``lr_scheduler``,
            ``lr_interval``, ``channels_last``, ``compile`` of ``Task``.

    Raises:
        ValueError: for an unknown strategy name, and for ``feature_networks`` with a strategy that cannot use them.
    """

    plain_default = True

    def __init__(
        self,
        network: str | nn.Module,
        num_classes: int,
        *,
        input_shape: Sequence[int] = (3, 32, 32),
        strategy: str | Strategy = "entropy",
        weights: str | None = None,
        classifier: str | None = None,
        feature_networks: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_classes, input_shape=input_shape, **kwargs)
        if isinstance(strategy, str) and strategy not in STRATEGIES:
            raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)} or a Strategy, got {strategy!r}")
        if feature_networks == [] or (isinstance(strategy, str) and feature_networks and strategy not in BY_FEATURES):
            raise ValueError(
                f"feature_networks is for the strategies {', '.join(BY_FEATURES)} and names one file or more, got "
                f"{feature_networks} with {strategy!r}: leave it out"
            )
        self.feature_networks = feature_networks
        self._representations: list[Callable[[Tensor, Tensor | None], Tensor]] = []
        self._strategy_name = strategy if isinstance(strategy, str) else type(strategy).__name__
        self.strategy = STRATEGIES[strategy]() if isinstance(strategy, str) else strategy
        self.network = self.build_to_train(network, weights)
        self._tap = penultimate_tap(self.network, classifier)[0] if self.strategy.needs_features else None

    @property
    def main_network(self) -> nn.Module:
        return self.network

    @property
    def strategy_name(self) -> str:
        return self._strategy_name

    @property
    def needs_labelled(self) -> bool:
        return self.strategy.needs_labelled

    @property
    def single_query(self) -> bool:
        return self.strategy.single_query

    def setup(self, stage: str) -> None:
        super().setup(stage)
        # at the start of a fit too, so that a wrong file is reported before the training
        scored = (stage == "predict" and self.predicts_pool) or (stage == "fit" and self.query_follows)
        wanted = self.strategy.needs_features and scored
        if self.feature_networks and wanted and not self._representations:
            if self.pool.score_with_train_augmentation:
                raise ValueError(
                    "feature_networks need images without augmentation, got score_with_train_augmentation=True: leave "
                    "it out"
                )
            self._representations = [open_representation(path, self.pool) for path in self.feature_networks]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch = as_batch(batch)
        (logits,) = at_least_float32(self(batch.image))
        return self.step_loss({"ce": F.cross_entropy(logits, batch.target)}, logits, batch.target)

    def pool_scores(self, image: Tensor, index: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        logits, probabilities = self.scores_and_probabilities(image)
        scores = {"logits": logits}
        if self._tap is not None:
            (scores["feature"],) = at_least_float32(self._tap.pop())
        scores |= {f"feature_{k}": features(image, index) for k, features in enumerate(self._representations)}
        return probabilities, scores

    def select(
        self, scores: Mapping[str, Tensor], pool: PoolView, budget: int, generator: np.random.Generator
    ) -> Query | Tensor | np.ndarray:
        return self.strategy.select(scores, pool, budget, generator)
