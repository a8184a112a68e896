"""The closed-set strategies that every method for open sets is compared with.

They look at one classifier of the known classes, and know of no others: to it, samples of unknown classes look
uncertain, and the strategies for uncertainty buy them first.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from lightning_kd.active_learning.diverse_selection import badge_picks, k_center_picks
from lightning_kd.active_learning.lewis_strategy import Lewis
from lightning_kd.active_learning.representations import joined, representations_in
from lightning_kd.active_learning.strategies import ScoreStrategy, Strategy
from lightning_kd.core.losses import at_least_float32
from lightning_kd.pool import PoolView, Query

__all__ = [
    "BADGE",
    "Certainty",
    "Entropy",
    "KCenter",
    "LeastConfidence",
    "Margin",
    "Random",
    "least_confidence",
    "predictive_entropy",
    "probability_margin",
]


def least_confidence(probabilities: Tensor) -> Tensor:
    """``1 - max p``: how unsure a classifier is of its best class; 0 to ``1 - 1 / K``.

    Args:
        probabilities: ``[N, K]``; half precision is computed in float32, float64 stays.

    Returns:
        ``[N]``.

    Raises:
        ValueError: for another shape.

    Source: Lewis and Gale, A Sequential Algorithm for Training Text Classifiers, arXiv cmp-lg/9407020.
    """
    return 1 - _checked(probabilities).amax(1)


def probability_margin(probabilities: Tensor) -> Tensor:
    """The largest probability minus the second largest: 0 is unsure, 1 is sure.

    Args:
        probabilities: ``[N, K]``, ``K >= 2``; half precision is computed in float32, float64 stays.

    Returns:
        ``[N]``.

    Raises:
        ValueError: for another shape, and for one class.

    Source: Scheffer, Decomain and Wrobel, Active Hidden Markov Models for Information Extraction, IDA 2001.
    """
    probabilities = _checked(probabilities)
    if probabilities.shape[1] < 2:
        raise ValueError(f"probabilities must be of at least 2 classes for a margin, got {probabilities.shape[1]}")
    first, second = probabilities.topk(2, dim=1).values.unbind(1)
    return first - second


def predictive_entropy(probabilities: Tensor) -> Tensor:
    """``-sum p log p`` in nats, where 0 log 0 is 0; 0 to ``log K``.

    Args:
        probabilities: ``[N, K]``; half precision is computed in float32, float64 stays.

    Returns:
        ``[N]``.

    Raises:
        ValueError: for another shape.

    Source: Shannon, A Mathematical Theory of Communication, 1948.
    """
    return torch.special.entr(_checked(probabilities)).sum(1)


def _checked(probabilities: Tensor) -> Tensor:
    if probabilities.ndim != 2 or not probabilities.shape[1]:
        raise ValueError(f"probabilities must be [N, K], got {list(probabilities.shape)}: give one row a sample")
    return at_least_float32(probabilities)[0]


def _probabilities(scores: Mapping[str, Tensor]) -> Tensor:
    """Float64 ``[U, K]``; from the logits where there are any: samples that float32 rounds to 1 still differ."""
    logits = scores.get("logits")
    return scores["probabilities"].double() if logits is None else logits.double().softmax(1)


class Random(Strategy):
    """Every sample alike."""

    def select(
        self, scores: Mapping[str, Tensor], pool: PoolView, budget: int, generator: np.random.Generator
    ) -> np.ndarray:
        return generator.permutation(pool.unlabelled)[:budget]


class LeastConfidence(ScoreStrategy):
    """The largest ``least_confidence`` first."""

    def score(self, scores: Mapping[str, Tensor], pool: PoolView) -> Tensor:
        return least_confidence(_probabilities(scores))


class Margin(ScoreStrategy):
    """The smallest ``probability_margin`` first; the score is minus that."""

    def score(self, scores: Mapping[str, Tensor], pool: PoolView) -> Tensor:
        return -probability_margin(_probabilities(scores))


class Entropy(ScoreStrategy):
    """The largest ``predictive_entropy`` first."""

    def score(self, scores: Mapping[str, Tensor], pool: PoolView) -> Tensor:
        return predictive_entropy(_probabilities(scores))


class Certainty(ScoreStrategy):
    """The largest probability of any class first: the opposite of ``LeastConfidence``."""

    def score(self, scores: Mapping[str, Tensor], pool: PoolView) -> Tensor:
        return _probabilities(scores).amax(1)


class KCenter(Strategy):
    """``k_center_greedy`` on the features, around those of the labelled samples of known classes.

    With several ``feature_networks`` the distance is that of all features side by side, where each network has the same
    share: the mean squared distance of the pool from its mean.

    The score is the distance to the nearest centre at the moment of the pick.
    """

    needs_features = True
    needs_labelled = True

    def select(
        self, scores: Mapping[str, Tensor], pool: PoolView, budget: int, generator: np.random.Generator
    ) -> Query:
        parts, labelled_parts = representations_in(scores), representations_in(pool.labelled_scores)
        if len(pool.known) and not labelled_parts:
            raise ValueError(
                f"pool.labelled_scores must hold 'feature' for the {len(pool.known)} labelled samples, got "
                f"{sorted(pool.labelled_scores)}: let the task's needs_labelled be True"
            )
        labelled = joined(labelled_parts, parts) if labelled_parts else torch.empty(0)
        picks = k_center_picks(joined(parts, parts), labelled, budget)
        return Query(pool.unlabelled[picks.row.numpy()], picks.score.numpy())


class BADGE(Strategy):
    """``badge_select`` on probabilities and features.

    The score is the squared distance to the nearest pick at the moment of the pick, of the first its squared norm.
    """

    needs_features = True

    def select(
        self, scores: Mapping[str, Tensor], pool: PoolView, budget: int, generator: np.random.Generator
    ) -> Query:
        picks = badge_picks(_probabilities(scores), scores["feature"], budget, generator)
        return Query(pool.unlabelled[picks.row.numpy()], picks.score.numpy())


STRATEGIES: dict[str, type[Strategy]] = {
    "random": Random,
    "least_confidence": LeastConfidence,
    "margin": Margin,
    "entropy": Entropy,
    "certainty": Certainty,
    "k_center": KCenter,
    "badge": BADGE,
    "lewis": Lewis,
}
