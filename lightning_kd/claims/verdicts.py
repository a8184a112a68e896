"""Judging an expectation by paired differences over seeds and their confidence interval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lightning_kd.claims.claim_file import Expectation

__all__ = ["HOLDS", "NOT", "UNDECIDED", "Verdict", "judge"]

HOLDS, NOT, UNDECIDED = "holds", "does not hold", "undecided"


@dataclass(frozen=True)
class Verdict:
    """The verdict on one expectation.

    Attributes:
        expectation: the expectation.
        differences: ``first - second`` for each seed.
        mean: mean of the differences.
        low: lower end of the 95 % confidence interval of the mean (Student's t); ``nan`` with one seed.
        high: upper end of the interval.
        verdict: ``holds`` if the whole interval is on the expected side of 0, ``does not hold`` if it is on the other
            side, else ``undecided``.
    """

    expectation: Expectation
    differences: tuple[float, ...]
    mean: float
    low: float
    high: float
    verdict: str


def judge(expectation: Expectation, values: Mapping[str, Sequence[float]]) -> Verdict:
    """Judge an expectation.

    Args:
        expectation: the expectation.
        values: for each setting one value for each seed, in the same order of seeds.
    """
    pairs = zip(values[expectation.first], values[expectation.second], strict=True)
    differences = tuple(first - second for first, second in pairs)
    mean, half = float(np.mean(differences)), _half_width(differences)
    low, high = mean - half, mean + half
    above, below = low > 0, high < 0
    as_expected, contrary = (above, below) if expectation.sign == ">" else (below, above)
    return Verdict(expectation, differences, mean, low, high, HOLDS if as_expected else NOT if contrary else UNDECIDED)


def _half_width(differences: Sequence[float]) -> float:
    if len(differences) < 2:
        return math.nan
    from scipy.special import stdtrit  # scikit-learn needs scipy itself

    n = len(differences)
    return float(stdtrit(n - 1, 0.975) * np.std(differences, ddof=1) / math.sqrt(n))
