"""The interface of query strategies, which choose the samples to label next."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from lightning_kd.pool import PoolView, Query

__all__ = ["ScoreStrategy", "Strategy", "take_best"]


class Strategy(ABC):
    """Chooses a query from a pool. Your own strategy is a subclass with one method, ``select``.

    A strategy that orders samples by one number each is simpler to write as a ``ScoreStrategy``.

    Attributes:
        needs_features: whether ``scores`` must hold ``feature`` ``[U, D]``, the input of the network's classifier.
            Default: False.
        needs_labelled: whether ``pool.labelled_scores`` must hold the scores of the labelled samples. Default: False.
        single_query: whether the whole budget goes into one query, so that a second query is refused. Default: False.
    """

    needs_features = False
    needs_labelled = False
    single_query = False

    @abstractmethod
    def select(
        self, scores: Mapping[str, Tensor], pool: PoolView, budget: int, generator: np.random.Generator
    ) -> Query | Tensor | np.ndarray:
        """Choose samples, the best first.

        Args:
            scores: the outputs of the task's ``predict_step`` for ``pool.unlabelled``, in its order, on the CPU. A
                ``PoolClassifier`` gives ``logits`` float32 ``[U, K]``, ``probabilities`` float32 ``[U, K]``, with
                ``needs_features`` also ``feature`` ``[U, D]``, and with ``feature_networks`` ``feature_0``,
                ``feature_1`` and so on, one for each.
            pool: what is known of the pool.
            budget: number of samples to choose, at most ``U``.
            generator: the only source of random numbers; it gives the same ones for the same seed and round.

        Returns:
            A ``Query``, or the indices alone, int64 ``[budget]``, unique, out of ``pool.unlabelled``.
        """


class ScoreStrategy(Strategy):
    """A strategy that computes one score for each sample and queries the largest; ties in order of index."""

    @abstractmethod
    def score(self, scores: Mapping[str, Tensor], pool: PoolView) -> Tensor:
        """The score of each sample, ``[U]``, any real dtype; the largest are queried.

        Args:
            scores: see ``Strategy.select``.
            pool: likewise.
        """

    def select(
        self, scores: Mapping[str, Tensor], pool: PoolView, budget: int, generator: np.random.Generator
    ) -> Query:
        return take_best(self.score(scores, pool), pool, budget)


def take_best(score: Tensor, pool: PoolView, budget: int, *ties: Tensor) -> Query:
    """The query of the ``budget`` samples with the largest score.

    Args:
        score: ``[U]``; NaN counts as the smallest.
        pool: its ``unlabelled`` are the samples.
        budget: number of samples.
        ties: ``[U]`` each. Equal scores are ordered by the first of them (larger first), then by the second and so on,
            then by index (smaller first).
    """
    keys = [key.detach().cpu().double().nan_to_num(-torch.inf, torch.inf, -torch.inf) for key in (score, *ties)]
    order = np.lexsort([-key.numpy() for key in reversed(keys)])[:budget]  # stable: pool.unlabelled is ascending
    return Query(pool.unlabelled[order], keys[0].numpy()[order])
