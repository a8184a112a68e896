"""The classic query strategies, with which the methods for open sets are compared.

They use one classifier of the known classes. Samples of unknown classes look uncertain to it, so strategies that query
uncertain samples query many of unknown classes.
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
    """``1 - max p``, the probability that the predicted class is wrong according to the classifier.

    Args:
        probabilities: ``[N, K]``; half precision is computed in float32, float64 stays.

    Returns:
        ``[N]``, from 0 (certain) to ``1 - 1 / K``.

    Raises:
        ValueError: for a wrong shape.

    Source: Lewis and Gale, A Sequential Algorithm for Training Text Classifiers, arXiv cmp-lg/9407020.
    """
    return 1 - _checked(probabilities).amax(1)


def probability_margin(probabilities: Tensor) -> Tensor:
    """The margin: the largest probability minus the second largest.

    Args:
        probabilities: ``[N, K]``, ``K >= 2``; half precision is computed in float32, float64 stays.

    Returns:
        ``[N]``, from 0 (uncertain) to 1 (certain).

    Raises:
        ValueError: for a wrong shape, and for one class.

    Source: Scheffer, Decomain and Wrobel, Active Hidden Markov Models for Information Extraction, IDA 2001.
    """
    probabilities = _checked(probabilities)
    if probabilities.shape[1] < 2:
        raise ValueError(f"probabilities must be of at least 2 classes for a margin, got {probabilities.shape[1]}")
    first, second = probabilities.topk(2, dim=1).values.unbind(1)
    return first - second


def predictive_entropy(probabilities: Tensor) -> Tensor:
    """The entropy ``-sum p log p`` in nats, where 0 log 0 is 0.

    Args:
        probabilities: ``[N, K]``; half precision is computed in float32, float64 stays.

    Returns:
        ``[N]``, from 0 (certain) to ``log K``.

    Raises:
        ValueError: for a wrong shape.

    Source: Shannon, A Mathematical Theory of Communication, 1948.
    """
    return torch.special.entr(_checked(probabilities)).sum(1)


def _checked(probabilities: Tensor) -> Tensor:
    if probabilities.ndim != 2 or not probabilities.shape[1]:
        raise ValueError(f"probabilities must be [N, K], got {list(probabilities.shape)}: give one row for each sample")
    return at_least_float32(probabilities)[0]


def _probabilities(scores: Mapping[str, Tensor]) -> Tensor:
    """Probabilities float64 ``[U, K]``, from ``logits`` if given: float32 probabilities may be rounded to 1."""
    logits = scores.get("logits")
    return scores["probabilities"].double() if logits is None else logits.double().softmax(1)


class Random(Strategy):
    """A uniformly random query."""

    def select(
        self, scores: Mapping[str, Tensor], pool: PoolView, budget: int, generator: np.random.Generator
    ) -> np.ndarray:
        return generator.permutation(pool.unlabelled)[:budget]


class LeastConfidence(ScoreStrategy):
    """Queries the samples with the largest ``least_confidence``, which is the score."""

    def score(self, scores: Mapping[str, Tensor], pool: PoolView) -> Tensor:
        return least_confidence(_probabilities(scores))


class Margin(ScoreStrategy):
    """Queries the samples with the smallest ``probability_margin``; the score is minus the margin."""

    def score(self, scores: Mapping[str, Tensor], pool: PoolView) -> Tensor:
        return -probability_margin(_probabilities(scores))


class Entropy(ScoreStrategy):
    """Queries the samples with the largest ``predictive_entropy``, which is the score."""

    def score(self, scores: Mapping[str, Tensor], pool: PoolView) -> Tensor:
        return predictive_entropy(_probabilities(scores))


class Certainty(ScoreStrategy):
    """Queries the samples with the largest probability of the predicted class: the opposite of ``LeastConfidence``."""

    def score(self, scores: Mapping[str, Tensor], pool: PoolView) -> Tensor:
        return _probabilities(scores).amax(1)


class KCenter(Strategy):
    """``k_center_greedy`` on the features (Sener and Savarese, ICLR 2018, arXiv 1708.00489).

    The centres at the start are the labelled samples of known classes. With several ``feature_networks`` the features
    are put side by side, those of each network scaled so that the pool's mean squared distance from its mean is 1.

    The score is the distance to the nearest centre just before the pick.
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
                f"{sorted(pool.labelled_scores)}: let needs_labelled of the task be True"
            )
        labelled = joined(labelled_parts, parts) if labelled_parts else torch.empty(0)
        picks = k_center_picks(joined(parts, parts), labelled, budget)
        return Query(pool.unlabelled[picks.row.numpy()], picks.score.numpy())


class BADGE(Strategy):
    """``badge_select`` on probabilities and features (Ash et al., ICLR 2020, arXiv 1906.03671).

    The score is the squared distance to the nearest earlier pick; for the first pick its squared norm.
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
