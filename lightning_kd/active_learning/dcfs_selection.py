"""DCFS's selection in two steps: samples that look known, then those of them with the largest fine score."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.losses import check_shapes
from lightning_kd.core.mixture import fit_mixture
from lightning_kd.core.scaling import min_max

Coarse = Literal["sum", "mixture", "data", "distribution", "none"]


def uncertainty_score(data: Tensor, distribution: Tensor, how: Coarse = "sum") -> Tensor:
    """DCFS's coarse score of each sample of a pool: the smaller, the more it looks like a known class.

    Args:
        data: ``[N]``, data uncertainties, see ``dirichlet_uncertainties``.
        distribution: ``[N]``, distribution uncertainties.
        how: ``"sum"``: both scaled to [0, 1] over the pool (0 if all are equal) and added. ``"mixture"``: two Gaussians
            are fitted to each of the scaled uncertainties; minus the logarithm of the product of the two posteriors of
            the lower Gaussian. ``"data"``, ``"distribution"``: one scaled uncertainty alone. ``"none"``: 0.

    Returns:
        float64 ``[N]``, on the CPU.

    Raises:
        ValueError: for different shapes, and for an unknown ``how``.
    """
    if how not in get_args(Coarse):
        raise ValueError(f"how must be one of {', '.join(get_args(Coarse))}, got {how!r}: give one of them")
    check_shapes(data=(data, "N"), distribution=(distribution, "N"))
    parts = [min_max(values.detach().cpu().double()) for values in (data, distribution)]
    if how == "mixture" and len(data):
        return sum((_unlikely_low(part) for part in parts), torch.zeros_like(parts[0]))
    chosen = {"sum": parts, "data": parts[:1], "distribution": parts[1:]}.get(how, [])
    return sum(chosen, torch.zeros_like(parts[0]))


def _unlikely_low(values: Tensor) -> Tensor:
    """Minus the logarithm of the posterior of the lower of two Gaussians, precise even for posteriors near 1."""
    low, high = fit_mixture(values).log_joint(values).T
    return F.softplus(high - low)


def coarse_to_fine(coarse: Tensor, fine: Tensor, budget: int, factor: float = 3.0) -> Tensor:
    """The samples with the largest ``fine`` among the ``factor * budget`` with the smallest ``coarse``.

    Ties of ``fine``: the smaller ``coarse``, then the smaller position. Both ``budget`` and ``factor * budget`` are
    limited to the size of the pool.

    Args:
        coarse: ``[N]``, any real dtype; smaller is kept.
        fine: ``[N]``, any real dtype; larger is taken.
        budget: number of samples to choose.
        factor: at least 1; ``factor * budget`` is rounded up. Infinity: no coarse step.

    Returns:
        int64 positions ``[min(budget, N)]`` on the CPU, the largest ``fine`` first.

    Raises:
        ValueError: for different shapes, a negative budget, and a factor below 1.
    """
    check_shapes(coarse=(coarse, "N"), fine=(fine, "N"))
    check_numbers(least=0, whole=True, budget=budget)
    if factor != math.inf:
        check_numbers(least=1, factor=factor)
    # minus 1e-9, since in floating point 1.1 * 100 is slightly above 110
    count = len(coarse) if math.isinf(factor) else min(len(coarse), math.ceil(factor * budget - 1e-9))
    kept = coarse.cpu().argsort(stable=True)[:count]
    return kept[fine.cpu()[kept].argsort(descending=True, stable=True)[:budget]]
