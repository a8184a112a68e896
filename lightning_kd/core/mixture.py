"""Gaussian mixtures of one variable, fitted in float64 from a start that needs no random numbers."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.univariate_kmeans import kmeans_partition, lower_of_two


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
    check_numbers(least=1, whole=True, components=components)
    x = _checked(values, max_iter, variance_floor)

    responsibility = kmeans_partition(x, components)
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


class Mixtures(NamedTuple):
    """Mixtures of two Gaussians, one for each group of values; the second component has the larger mean.

    Attributes:
        mean: float64 ``[G, 2]``; NaN, like the others, in the rows of groups that were not fitted.
        variance: float64 ``[G, 2]``, the floor included.
        weight: float64 ``[G, 2]``, rows sum to 1.
        iterations: int64 ``[G]``, EM iterations done.
        fitted: bool ``[G]``.
    """

    mean: Tensor
    variance: Tensor
    weight: Tensor
    iterations: Tensor
    fitted: Tensor

    def log_odds(self, values: Tensor, group: Tensor) -> Tensor:
        """The log-odds of the larger component in each value's own group, float64 ``[N]``.

        Their sigmoid is the posterior; unlike that they still differ where both are certain.

        Args:
            values: ``[N]``.
            group: int64 ``[N]``.
        """
        parameters = torch.stack(self[:3]).transpose(1, 2)
        low, high = _group_log_joint(parameters, values.detach().to("cpu", torch.float64), group.cpu())
        return high - low


def fit_mixtures(
    values: Tensor, group: Tensor, num_groups: int, max_iter: int = 10, tol: float = 1e-2, variance_floor: float = 5e-4
) -> Mixtures:
    """``fit_mixture`` with two components for every group of values, all groups in one EM.

    Each group starts and stops as if it were alone. A group of fewer than 2 values is not fitted.

    Args:
        values: ``[N]``, any real dtype and device, finite; may be empty.
        group: int64 ``[N]``, 0 to ``num_groups - 1``.
        num_groups: ``G``.
        max_iter: the most EM iterations, at least 1.
        tol: a group stops when its mean log-likelihood changes by less.
        variance_floor: added to each variance, above 0.

    Returns:
        The mixtures, on the CPU.

    Raises:
        ValueError: where ``values`` is not one-dimensional or not finite, ``group`` does not belong to it, or another
            argument is out of range.
    """
    if values.ndim != 1 or group.shape != values.shape or group.dtype != torch.int64:
        raise ValueError(
            f"values must be [N] and group int64 [N], got {list(values.shape)} and {group.dtype} {list(group.shape)}: "
            "give one number and one group a sample"
        )
    x, group = _checked(values, max_iter, variance_floor), group.cpu()
    if len(group) and not 0 <= int(group.min()) <= int(group.max()) < num_groups:
        raise ValueError(
            f"group must be between 0 and {num_groups - 1}, got {int(group.min())} to {int(group.max())}: raise "
            "num_groups"
        )
    size = group.bincount(minlength=num_groups)
    fitted = size >= 2
    iterations = torch.zeros_like(size)
    parameters = torch.full((3, num_groups, 2), math.nan, dtype=torch.float64)
    if fitted.any():
        order = torch.from_numpy(x.numpy().argsort())
        order = order[group[order].argsort(stable=True)]  # by group, then by value
        order = order[fitted[group[order]]]
        number = fitted.cumsum(0) - 1
        found, iterations[fitted] = _fit_sorted(
            x[order], number[group[order]], size[fitted], max_iter, tol, variance_floor
        )
        rank = found[0].argsort(dim=0, stable=True).expand(3, 2, -1)
        parameters[:, fitted] = found.gather(1, rank).transpose(1, 2)
    mean, variance, weight = parameters
    return Mixtures(mean, variance, weight, iterations, fitted)


def _fit_sorted(
    x: Tensor, group: Tensor, size: Tensor, max_iter: int, tol: float, variance_floor: float
) -> tuple[Tensor, Tensor]:
    """Parameters ``[3, 2, G]`` and iterations ``[G]``; ``x`` is sorted by group, then by value."""
    low = lower_of_two(x, group, size)
    current = _maximise_groups(x, group, torch.stack([low, 1 - low]), size, variance_floor)
    iterations = torch.zeros_like(size)
    previous = torch.full(size.shape, -math.inf, dtype=x.dtype)
    running = torch.ones_like(size, dtype=torch.bool)
    for _ in range(max_iter):
        joint = _group_log_joint(current, x, group)
        log_density = torch.logaddexp(joint[0], joint[1])
        likelihood = group.bincount(log_density, len(size)) / size
        updated = _maximise_groups(x, group, (joint - log_density).exp_(), size, variance_floor)
        current = torch.where(running, updated, current)
        iterations += running
        running = running & ~((likelihood - previous).abs() < tol)
        previous = likelihood
        left = running[group]
        x, group = x[left], group[left]
        if not len(x):
            break
    return current, iterations


def _checked(values: Tensor, max_iter: int, variance_floor: float) -> Tensor:
    """``values`` in float64 on the CPU, if all is as it must be."""
    check_numbers(least=1, whole=True, max_iter=max_iter)
    check_numbers(above=0, remedy="equal values have no variance", variance_floor=variance_floor)
    x = values.detach().to("cpu", torch.float64)
    if not x.isfinite().all():
        raise ValueError(f"values must be finite, got {int((~x.isfinite()).sum())} of {len(x)} that are not")
    return x


def _group_log_joint(parameters: Tensor, x: Tensor, group: Tensor) -> Tensor:
    """``log(weight_j N(x; mean_j, variance_j))``, ``[2, N]``; ``parameters`` ``[3, 2, G]``: mean, variance, weight."""
    mean, variance, weight = parameters
    constant = weight.log() - 0.5 * (2 * math.pi * variance).log()
    return _spread(constant, group) - (x - _spread(mean, group)).square_() * _spread(0.5 / variance, group)


def _spread(parts: Tensor, group: Tensor) -> Tensor:
    """From ``[2, G]`` to ``[2, N]``."""
    return torch.stack([part.index_select(0, group) for part in parts])  # faster than along the second dimension


def _maximise_groups(x: Tensor, group: Tensor, responsibility: Tensor, size: Tensor, variance_floor: float) -> Tensor:
    """The M-step of every group, from ``responsibility`` ``[2, N]``: ``[3, 2, G]``, mean, variance and weight."""

    def sums(parts: Tensor) -> Tensor:
        return torch.stack([group.bincount(part, len(size)) for part in parts])

    count = sums(responsibility) + 10 * torch.finfo(torch.float64).eps
    mean = sums(x * responsibility) / count
    variance = sums((x - _spread(mean, group)).square_() * responsibility) / count + variance_floor
    return torch.stack([mean, variance, count / count.sum(0)])


def _maximise(x: Tensor, responsibility: Tensor, variance_floor: float) -> Mixture:
    """The M-step: the components that fit ``responsibility`` ``[N, k]`` best."""
    count = responsibility.sum(0) + 10 * torch.finfo(torch.float64).eps  # a component may have lost all its values
    mean = (x @ responsibility) / count
    variance = ((x[:, None] - mean).square() * responsibility).sum(0) / count + variance_floor
    return Mixture(mean, variance, count / count.sum(), 0)
