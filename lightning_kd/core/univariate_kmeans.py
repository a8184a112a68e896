"""Exact k-means of one variable, without random numbers, as the start of mixture fits."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# for three or more clusters, more different values than this are first put into so many groups of neighbours
_MOST_GROUPS = 2048


def kmeans_partition(x: Tensor, clusters: int) -> Tensor:
    """The k-means partition of ``x`` ``[N]`` as one-hot rows, float64 ``[N, clusters]``.

    With fewer different values than clusters all entries are ``1 / clusters``.
    """
    distinct, inverse, count = x.unique(return_inverse=True, return_counts=True)
    if len(distinct) < clusters:
        return torch.full((len(x), clusters), 1 / clusters, dtype=torch.float64)
    centred = distinct - x.mean()  # prefix sums of squares are imprecise far from 0
    weight = count.double()
    starts = _best_split(centred, weight) if clusters == 2 else _best_partition(centred, weight, clusters)
    cluster = torch.bucketize(torch.arange(len(distinct)), starts, right=True)
    return torch.nn.functional.one_hot(cluster, clusters).double()[inverse]


def _best_split(x: Tensor, weight: Tensor) -> Tensor:
    """The position in the sorted ``x`` at which the second of two clusters starts, int64 ``[1]``."""
    w, s = weight.cumsum(0), (weight * x).cumsum(0)
    left, right = s[:-1].square() / w[:-1], (s[-1] - s[:-1]).square() / (w[-1] - w[:-1])
    between = left + right  # the largest between-cluster sum of squares is the smallest within-cluster one
    return (between >= _all_but(between.max())).byte().argmax()[None] + 1


def _best_partition(x: Tensor, weight: Tensor, clusters: int) -> Tensor:
    """The positions in the sorted ``x`` at which all clusters but the first start, int64 ``[clusters - 1]``.

    Found by dynamic programming.
    """
    n = min(len(x), _MOST_GROUPS)
    first = torch.arange(n + 1) * len(x) // n  # the first value of each group, and the end
    sums = torch.stack([weight, weight * x, weight * x.square()]).cumsum(1)
    w, s, q = torch.cat([torch.zeros(3, 1, dtype=x.dtype), sums], 1)[:, first]
    # within[i, j]: sum of squares in one cluster of the groups i to j - 1
    within = (q - q[:, None]) - (s - s[:, None]).square() / (w - w[:, None])
    within = within.where(torch.ones(n + 1, n + 1, dtype=torch.bool).triu(1), torch.inf)
    best, choices = within[0], []
    for _ in range(clusters - 1):
        best, choice = (best[:, None] + within).min(0)
        choices.append(choice)
    ends = [n]
    for choice in reversed(choices):
        ends.append(int(choice[ends[-1]]))
    return first[torch.tensor(ends[:0:-1], dtype=torch.int64)]


def lower_of_two(x: Tensor, size: Tensor) -> Tensor:
    """The first column of ``kmeans_partition`` for two clusters, within every group of values.

    Args:
        x: float64 ``[N]``, sorted by group, then by value.
        size: int64 ``[G]``, the number of values in each group, at least 1.

    Returns:
        float64 ``[N]``.
    """

    def spread(parts: Tensor) -> Tensor:
        return parts.repeat_interleave(size)

    end = size.cumsum(0)
    first = end - size
    rises = torch.cat([x[1:] > x[:-1], torch.tensor([False])])
    x = x - spread(group_sums(x, size) / size)
    # all groups share one running sum, so each is scaled to a largest absolute value of 1
    x = x / spread(x[first].abs().maximum(x[end - 1].abs()).clamp_min(torch.finfo(x.dtype).tiny))
    position = torch.arange(len(x))
    count, rest = position - spread(first - 1), spread(end - 1) - position
    total = x.cumsum(0)
    left = total - spread((total - x)[first])
    right = spread(left[end - 1]) - left
    score = torch.where(rises & (rest > 0), left.square() / count + right.square() / rest, -1.0)
    best = torch.from_numpy(np.maximum.reduceat(score.numpy(), first.numpy()))
    chosen = torch.where(score >= spread(_all_but(best)), position, len(x))
    split = torch.from_numpy(np.minimum.reduceat(chosen.numpy(), first.numpy()))
    return torch.where(spread(best < 0), 0.5, (position <= spread(split)).double())


def group_sums(values: Tensor, size: Tensor) -> Tensor:
    """The sums of neighbours, ``[..., G]``.

    Args:
        values: ``[..., N]``, on the CPU.
        size: int64 ``[G]``, how many of them each sum is of, at least 1; together ``N``.
    """
    first = (size.cumsum(0) - size).numpy()
    return torch.from_numpy(np.add.reduceat(values.numpy(), first, axis=-1))


def _all_but(best: Tensor) -> Tensor:
    """The smallest score that counts as equal to ``best``, so that rounding does not decide between equal splits."""
    return best - 1e-12 * best.abs()
