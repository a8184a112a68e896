"""Gaussian mixtures of one variable, fitted in float64 from a start that needs no random numbers."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

# More different values than this are put in as many groups before the start for three or more components.
_MOST_GROUPS = 2048


class Mixture(NamedTuple):
    """A fitted mixture, its components in ascending order of their means.

    Not a plain value for ``torch.load(weights_only=True)``: keep ``_asdict()`` in checkpoints.

    Attributes:
        mean: float64 ``[k]``.
        variance: float64 ``[k]``, the floor included.
        weight: float64 ``[k]``, sum 1.
        iterations: EM iterations done.
    """

    mean: Tensor
    variance: Tensor
    weight: Tensor
    iterations: int

    def log_joint(self, values: Tensor) -> Tensor:
        """``log(weight_j N(value; mean_j, variance_j))``, float64 ``[N, k]``, for ``values`` ``[N]``."""
        x = values.detach().to("cpu", torch.float64)[:, None]
        constant = self.weight.log() - 0.5 * (2 * math.pi * self.variance).log()
        return constant - (x - self.mean).square() / (2 * self.variance)

    def log_density(self, values: Tensor) -> Tensor:
        """The logarithm of the mixture's density, float64 ``[N]``, at ``values`` ``[N]``."""
        return self.log_joint(values).logsumexp(1)

    def posterior(self, values: Tensor) -> Tensor:
        """The probability of each component, float64 ``[N, k]``, given ``values`` ``[N]``. Rows sum to 1.

        Column ``k - 1`` belongs to the largest mean. It need not rise with the value: a wide lower component can win
        again beyond a narrow upper one.
        """
        return self.log_joint(values).softmax(1)


def fit_mixture(
    values: Tensor, components: int = 2, max_iter: int = 10, tol: float = 1e-2, variance_floor: float = 5e-4
) -> Mixture:
    """Fit a mixture of Gaussians to one variable by a few EM iterations.

    The start is the best k-means partition itself, found exactly, so that equal values in any order give the same
    mixture; from three components on it is exact for up to 2048 different values and taken from groups of neighbours
    beyond. Each iteration is an E-step, the mean log-likelihood of the parameters it used, and an M-step; the last one
    is the first whose log-likelihood differs by less than ``tol`` from the one before. With the same start this is
    what scikit-learn's ``GaussianMixture(reg_covar=variance_floor)`` does (used so by DivideMix, arXiv:2002.07394, DPC,
    arXiv:2401.07062, and LfOSA, arXiv:2201.06758).

    With fewer different values than components nothing can be told apart: all components are then the one Gaussian of
    all values with equal weights, and every posterior is ``1 / components``.

    Args:
        values: ``[N]``, any real dtype and device, finite.
        components: number of Gaussians, at least 1.
        max_iter: the most EM iterations, at least 1.
        tol: stop when the mean log-likelihood changes by less.
        variance_floor: added to each variance, above 0.

    Returns:
        The mixture, on the CPU.

    Raises:
        ValueError: where ``values`` is empty, not one-dimensional or not finite, or another argument is out of range.
    """
    if values.ndim != 1 or not len(values):
        raise ValueError(f"values must be [N] with N at least 1, got {list(values.shape)}: give one number a sample")
    for name, least, number in (("components", 1, components), ("max_iter", 1, max_iter)):
        if number < least:
            raise ValueError(f"{name} must be at least {least}, got {number}")
    if not variance_floor > 0:
        raise ValueError(f"variance_floor must be above 0, got {variance_floor}: equal values have no variance")
    x = values.detach().to("cpu", torch.float64)
    if not x.isfinite().all():
        raise ValueError(f"values must be finite, got {int((~x.isfinite()).sum())} of {len(x)} that are not")

    responsibility = _kmeans_start(x, components)
    mixture = _maximise(x, responsibility, variance_floor)
    previous = -math.inf
    iterations = 0
    while iterations < max_iter:
        iterations += 1
        joint = mixture.log_joint(x)
        log_density = joint.logsumexp(1, keepdim=True)
        likelihood = log_density.mean().item()
        mixture = _maximise(x, (joint - log_density).exp(), variance_floor)
        if abs(likelihood - previous) < tol:
            break
        previous = likelihood
    order = mixture.mean.argsort(stable=True)
    return Mixture(mixture.mean[order], mixture.variance[order], mixture.weight[order], iterations)


def _maximise(x: Tensor, responsibility: Tensor, variance_floor: float) -> Mixture:
    """The M-step: the components that fit ``responsibility`` ``[N, k]`` best."""
    count = responsibility.sum(0) + 10 * torch.finfo(torch.float64).eps  # a component may have lost all its values
    mean = (x @ responsibility) / count
    variance = ((x[:, None] - mean).square() * responsibility).sum(0) / count + variance_floor
    return Mixture(mean, variance, count / count.sum(), 0)


def _kmeans_start(x: Tensor, components: int) -> Tensor:
    """One-hot ``[N, components]`` of the k-means partition; uniform with too few different values."""
    distinct, inverse, count = x.unique(return_inverse=True, return_counts=True)
    if len(distinct) < components:
        return torch.full((len(x), components), 1 / components, dtype=torch.float64)
    centred = distinct - x.mean()  # prefix sums of squares lose digits far from 0
    weight = count.double()
    starts = _best_split(centred, weight) if components == 2 else _best_partition(centred, weight, components)
    cluster = torch.bucketize(torch.arange(len(distinct)), starts, right=True)
    return torch.nn.functional.one_hot(cluster, components).double()[inverse]


def _best_split(x: Tensor, weight: Tensor) -> Tensor:
    """Where the second of two clusters starts in the sorted ``x``: int64 ``[1]``."""
    w, s = weight.cumsum(0), (weight * x).cumsum(0)
    left, right = s[:-1].square() / w[:-1], (s[-1] - s[:-1]).square() / (w[-1] - w[:-1])
    return (left + right).argmax()[None] + 1  # the largest sum between is the smallest sum within


def _best_partition(x: Tensor, weight: Tensor, clusters: int) -> Tensor:
    """Where all clusters but the first start in the sorted ``x``, int64 ``[clusters - 1]``: dynamic programming."""
    n = min(len(x), _MOST_GROUPS)
    first = torch.arange(n + 1) * len(x) // n  # the first value of each group, and the end
    sums = torch.stack([weight, weight * x, weight * x.square()]).cumsum(1)
    w, s, q = torch.cat([torch.zeros(3, 1, dtype=x.dtype), sums], 1)[:, first]
    # within[i, j]: the squares within one cluster of groups i .. j - 1
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
