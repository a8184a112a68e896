"""Paired differences, their confidence interval and the verdict."""

import math

import pytest

from lightning_kd.claims.claim_file import Expectation
from lightning_kd.claims.verdicts import judge

BETTER, WORSE = [5.0, 6.0, 9.0], [4.0, 4.0, 6.0]  # differences 1, 2, 3


def test_interval_is_that_of_students_t():
    """t(0.975; 2) = 4.302653; the deviation of 1, 2, 3 is 1: 4.302653 / sqrt(3) = 2.484138."""
    verdict = judge(Expectation("a", ">", "b"), {"a": BETTER, "b": WORSE})
    assert verdict.differences == (1.0, 2.0, 3.0)
    assert (verdict.mean, verdict.low, verdict.high) == pytest.approx((2.0, -0.484138, 4.484138), abs=1e-6)
    assert verdict.verdict == "undecided"


@pytest.mark.parametrize(
    ("first", "sign", "expected"),
    [
        ([2.0, 2.1, 1.9], ">", "holds"),
        ([-2.0, -2.1, -1.9], ">", "does not hold"),
        ([-2.0, -2.1, -1.9], "<", "holds"),
        ([2.0, 2.1, 1.9], "<", "does not hold"),
        ([0.0, 0.0, 0.0], ">", "undecided"),
        ([2.0, math.nan, 1.9], ">", "undecided"),
    ],
)
def test_verdict_follows_from_the_interval(first, sign, expected):
    assert judge(Expectation("a", sign, "b"), {"a": first, "b": [0.0] * 3}).verdict == expected


def test_differences_are_paired_by_seed():
    """Only the differences within a seed count, about 0.1, not the spread of 30 over the seeds."""
    verdict = judge(Expectation("a", ">", "b"), {"a": [10.1, 40.1, 70.11], "b": [10.0, 40.0, 70.0]})
    assert verdict.verdict == "holds"


def test_verdict_of_one_seed_is_undecided():
    verdict = judge(Expectation("a", ">", "b"), {"a": [2.0], "b": [1.0]})
    assert (verdict.mean, verdict.verdict) == (1.0, "undecided")
    assert math.isnan(verdict.low)
