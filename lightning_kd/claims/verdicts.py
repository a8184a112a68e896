"""Whether an expectation shows: paired differences over seeds, with an interval."""

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
    """One expectation, judged.

    Attributes:
        expectation: what was expected.
        differences: ``first - second`` for each seed.
        mean: of them.
        low: lower end of the 95 % interval of the mean, by Student's t; ``nan`` with one seed.
        high: its upper end.
        verdict: ``holds`` where the whole interval lies on the expected side of 0, ``does not hold`` where it lies on
            the other, else ``undecided``.
    """

    expectation: Expectation
    differences: tuple[float, ...]
    mean: float
    low: float
    high: float
    verdict: str


def judge(expectation: Expectation, values: Mapping[str, Sequence[float]]) -> Verdict:
    """Judge by the values of each setting, one a seed and in the same order of seeds in all settings."""
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
