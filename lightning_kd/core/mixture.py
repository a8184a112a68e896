"""Gaussian mixtures of one variable, fitted by EM in float64 from a deterministic start."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.univariate_kmeans import group_sums, kmeans_partition, lower_of_two


class Mixture(NamedTuple):
    """A fitted mixture, its components in ascending order of their means.

    Store ``_asdict()`` in checkpoints: ``torch.load(weights_only=True)`` does not load this class.

    Attributes:
        mean: float64 ``[k]``.
        variance: float64 ``[k]``, including the floor.
        weight: float64 ``[k]``, sums to 1.
        iterations: number of EM iterations.
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
        """The posterior probability of each component, float64 ``[N, k]``, for ``values`` ``[N]``. Rows sum to 1.

        Column ``k - 1`` is the component with the largest mean. It need not increase with the value: far above, a wide
        lower component can be likelier than a narrow upper one.
        """
        return self.log_joint(values).softmax(1)


def fit_mixture(
    values: Tensor, components: int = 2, max_iter: int = 10, tol: float = 1e-2, variance_floor: float = 5e-4
) -> Mixture:
    """Fit a mixture of Gaussians to one variable by a few EM iterations.

    EM starts from the optimal k-means partition, so that the order of the values does not matter. (For three or more
    components and over 2048 different values, the partition is of groups of neighbouring values.) Each iteration is an
    E-step, which also gives the mean log-likelihood of the present parameters, and an M-step. The iteration ends when
    the log-likelihood differs by less than ``tol`` from that of the iteration before. With the same start,
    scikit-learn's ``GaussianMixture(reg_covar=variance_floor)`` does the same; DivideMix (arXiv 2002.07394), DPC (arXiv
    2401.07062) and LfOSA (arXiv 2201.06758) use it so.

    With fewer different values than components, all components are the Gaussian of all values with equal weights, and
    every posterior is ``1 / components``.

    Args:
        values: ``[N]``, any real dtype and device, finite.
        components: number of Gaussians, at least 1.
        max_iter: the most EM iterations, at least 1.
        tol: EM ends when the mean log-likelihood changes by less than this.
        variance_floor: added to each variance, above 0.

    Returns:
        The mixture, on the CPU.

    Raises:
        ValueError: if ``values`` is empty, not one-dimensional or not finite, or another argument is out of range.
    """
    if values.ndim != 1 or not len(values):
        raise ValueError(
            f"values must be [N] with N at least 1, got {list(values.shape)}: give one number for each sample"
        )
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
        mean: float64 ``[G, 2]``; NaN, like variance and weight, for groups that were not fitted.
        variance: float64 ``[G, 2]``, including the floor.
        weight: float64 ``[G, 2]``, rows sum to 1.
        iterations: int64 ``[G]``, number of EM iterations.
        fitted: bool ``[G]``, whether the group was fitted.
    """

    mean: Tensor
    variance: Tensor
    weight: Tensor
    iterations: Tensor
    fitted: Tensor

    def log_odds(self, values: Tensor, group: Tensor) -> Tensor:
        """The log-odds of the component with the larger mean in each value's group, float64 ``[N]``.

        Their sigmoid is the posterior. Unlike posteriors, which are rounded to 0 or 1, they always order the values.

        Args:
            values: ``[N]``.
            group: int64 ``[N]``, the group of each value.
        """
        parameters = torch.stack(self[:3]).transpose(1, 2)
        low, high = _group_log_joint(parameters, values.detach().to("cpu", torch.float64), group.cpu())
        return high - low


def fit_mixtures(
    values: Tensor, group: Tensor, num_groups: int, max_iter: int = 10, tol: float = 1e-2, variance_floor: float = 5e-4
) -> Mixtures:
    """``fit_mixture`` with two components for every group of values, computed for all groups at once.

    The results are those of fitting each group by itself. A group of fewer than 2 values is not fitted.

    Args:
        values: ``[N]``, any real dtype and device, finite; may be empty.
        group: int64 ``[N]``, the group of each value, 0 to ``num_groups - 1``.
        num_groups: ``G``.
        max_iter: the most EM iterations, at least 1.
        tol: EM for a group ends when its mean log-likelihood changes by less than this.
        variance_floor: added to each variance, above 0.

    Returns:
        The mixtures, on the CPU.

    Raises:
        ValueError: if ``values`` is not one-dimensional or not finite, ``group`` has another shape or dtype, or another
            argument is out of range.
    """
    if values.ndim != 1 or group.shape != values.shape or group.dtype != torch.int64:
        raise ValueError(
            f"values must be [N] and group int64 [N], got {list(values.shape)} and {group.dtype} {list(group.shape)}: "
            "give one number and one group for each sample"
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
        by_value = x.numpy().argsort()
        # by group, then by value; sorting is fastest for few bits
        by_group = group.numpy()[by_value].astype(np.min_scalar_type(num_groups)).argsort(kind="stable")
        order = torch.from_numpy(by_value[by_group])
        order = order[fitted[group][order]]
        found, iterations[fitted] = _fit_sorted(x[order], size[fitted], max_iter, tol, variance_floor)
        rank = found[0].argsort(dim=0, stable=True).expand(3, 2, -1)
        parameters[:, fitted] = found.gather(1, rank).transpose(1, 2)
    mean, variance, weight = parameters
    return Mixtures(mean, variance, weight, iterations, fitted)


def _fit_sorted(x: Tensor, size: Tensor, max_iter: int, tol: float, variance_floor: float) -> tuple[Tensor, Tensor]:
    """Parameters ``[3, 2, G]`` and iterations ``[G]``; ``x`` is sorted by group, then by value."""
    low, group = lower_of_two(x, size), torch.arange(len(size)).repeat_interleave(size)
    found = _maximise_groups(x, group, torch.stack([low, 1 - low]), size, variance_floor)
    iterations = torch.zeros_like(size)
    running = torch.arange(len(size))  # the groups that x and size are of
    previous = torch.full(size.shape, -math.inf, dtype=x.dtype)
    for _ in range(max_iter):
        group = torch.arange(len(size)).repeat_interleave(size)
        joint = _group_log_joint(found[..., running], x, group)
        log_density = torch.logaddexp(joint[0], joint[1])
        likelihood = group_sums(log_density, size) / size
        found[..., running] = _maximise_groups(x, group, (joint - log_density).exp_(), size, variance_floor)
        iterations[running] += 1
        left = ~((likelihood - previous).abs() < tol)
        if not left.any():
            break
        x, size, running, previous = x[left[group]], size[left], running[left], likelihood[left]
    return found, iterations


def _checked(values: Tensor, max_iter: int, variance_floor: float) -> Tensor:
    """``values`` in float64 on the CPU, after checking the arguments."""
    check_numbers(least=1, whole=True, max_iter=max_iter)
    check_numbers(above=0, remedy="equal values have no variance", variance_floor=variance_floor)
    x = values.detach().to("cpu", torch.float64)
    if not x.isfinite().all():
        raise ValueError(
            f"values must be finite, got {int((~x.isfinite()).sum())} of {len(x)} that are not: look at the training"
        )
    return x


def _group_log_joint(parameters: Tensor, x: Tensor, group: Tensor) -> Tensor:
    """``log(weight_j N(x; mean_j, variance_j))``, ``[2, N]``; ``parameters`` ``[3, 2, G]``: mean, variance, weight."""
    mean, variance, weight = parameters
    constant = weight.log() - 0.5 * (2 * math.pi * variance).log()
    return _spread(constant, group) - (x - _spread(mean, group)).square_() * _spread(0.5 / variance, group)


def _spread(parts: Tensor, group: Tensor) -> Tensor:
    """The columns of ``parts`` ``[2, G]`` for each value's group, ``[2, N]``."""
    return torch.stack([part.index_select(0, group) for part in parts])  # faster than along the second dimension


def _maximise_groups(x: Tensor, group: Tensor, responsibility: Tensor, size: Tensor, variance_floor: float) -> Tensor:
    """The M-step of every group, from ``responsibility`` ``[2, N]``: ``[3, 2, G]``, mean, variance and weight."""
    count = group_sums(responsibility, size) + 10 * torch.finfo(torch.float64).eps
    mean = group_sums(x * responsibility, size) / count
    variance = group_sums((x - _spread(mean, group)).square_() * responsibility, size) / count + variance_floor
    return torch.stack([mean, variance, count / count.sum(0)])


def _maximise(x: Tensor, responsibility: Tensor, variance_floor: float) -> Mixture:
    """The M-step: the maximum-likelihood components for ``responsibility`` ``[N, k]``."""
    count = responsibility.sum(0) + 10 * torch.finfo(torch.float64).eps  # a component may have no values left
    mean = (x @ responsibility) / count
    variance = ((x[:, None] - mean).square() * responsibility).sum(0) / count + variance_floor
    return Mixture(mean, variance, count / count.sum(), 0)
