"""What chooses the samples to label next."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from lightning_kd.pool import PoolView, Query

__all__ = ["ScoreStrategy", "Strategy", "take_best"]


class Strategy(ABC):
    """Chooses from a pool. Yours is a subclass with one method; most are a ``ScoreStrategy``.

    Attributes:
        needs_features: whether ``scores`` must hold ``feature`` ``[U, D]``, the input of the network's classifier.
        needs_labelled: whether ``pool.labelled_scores`` must be there.
        asks_once: whether all of the budget goes into one query, so that a second one is refused.
    """

    needs_features = False
    needs_labelled = False
    asks_once = False

    @abstractmethod
    def select(
        self, scores: Mapping[str, Tensor], pool: PoolView, budget: int, generator: np.random.Generator
    ) -> Query | Tensor | np.ndarray:
        """Choose samples, the best first.

        Args:
            scores: what the task's ``predict_step`` gives for ``pool.unlabelled``, on the CPU, in its order: for a
                ``PoolClassifier`` ``logits`` float32 ``[U, K]``, ``probabilities`` float32 ``[U, K]`` and, where
                ``needs_features``, ``feature`` ``[U, D]``, and ``feature_0``, ``feature_1`` and so on by the task's
                ``feature_networks``.
            pool: what is known of the pool.
            budget: how many samples to choose, at most ``U``.
            generator: the only source of random numbers; the same one for the same seed and round.

        Returns:
            A ``Query``, or the indices alone, int64 ``[budget]``, unique, out of ``pool.unlabelled``.
        """


class ScoreStrategy(Strategy):
    """A strategy that gives every sample a score of its own and takes the largest; equal ones in order of index."""

    @abstractmethod
    def score(self, scores: Mapping[str, Tensor], pool: PoolView) -> Tensor:
        """``[U]``, any real dtype; larger is chosen first."""

    def select(
        self, scores: Mapping[str, Tensor], pool: PoolView, budget: int, generator: np.random.Generator
    ) -> Query:
        return take_best(self.score(scores, pool), pool, budget)


def take_best(score: Tensor, pool: PoolView, budget: int, *ties: Tensor) -> Query:
    """The ``budget`` samples with the largest score.

    Args:
        score: ``[U]``; NaN counts as the least.
        pool: the samples.
        budget: how many.
        ties: ``[U]`` each: where scores are equal, the larger of the first decides, then of the second, and so on; at
            last the smaller index.
    """
    keys = [key.detach().cpu().double().nan_to_num(-torch.inf, torch.inf, -torch.inf) for key in (score, *ties)]
    order = np.lexsort([-key.numpy() for key in reversed(keys)])[:budget]  # stable: pool.unlabelled is ascending
    return Query(pool.unlabelled[order], keys[0].numpy()[order])
