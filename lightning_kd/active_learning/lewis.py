"""Lewis weights of feature matrices, and drawing samples by them: one query that serves several networks.

Sheng-Jun Huang, Yi Li, Yiming Sun, Ying-Peng Tang. One-shot Active Learning Based on Lewis Weight Sampling for Multiple
Deep Models. ICLR 2024, arXiv 2405.14121. The paper defines the weights; how they are computed here is a relaxed fixed
point that converges for every p.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_kd.active_learning.reweighted_regression import lp_regression
from lightning_kd.active_learning.whitened_rows import WhitenedRows, cpu_tensor
from lightning_kd.argument_checks import check_numbers

__all__ = [
    "Draw",
    "LewisCertificate",
    "draw_until",
    "lewis_certificate",
    "lewis_weights",
    "lp_regression",
    "max_lewis_weights",
]

MOST_DRAWS = 10_000_000


def lewis_weights(
    features: Tensor | np.ndarray,
    p: float = 2.0,
    *,
    tolerance: float = 1e-10,
    max_iterations: int = 500,
    rank_tolerance: float | None = None,
) -> Tensor:
    """The Lewis weights of the rows ``a_i`` of a matrix ``A``: ``w_i = (a_i^T (A^T W^(1 - 2/p) A)^+ a_i)^(p/2)``.

    ``W`` is the diagonal matrix of the weights themselves. A weight says how much a row matters for regression with the
    loss ``|residual|^p``: a row that is unlike all others has a large one. Weights are in [0, 1] and sum to the rank;
    an invertible linear map of the columns does not change them. With ``p = 2`` they are the leverage scores, which
    need no iteration. Otherwise each pass moves ``log w`` by ``4 / (p + 2)`` of the distance to its fixed point, which
    converges at the rate ``|p - 2| / (p + 2)`` for every ``p > 0``. All is computed in float64, on the CPU, in the
    basis of one QR decomposition, with ``O(n + d^2)`` memory beside the features.

    Args:
        features: ``[n, d]``, any real dtype. A row of zeros has the weight 0.
        p: exponent of the loss ``|residual|^p``, above 0.
        tolerance: the iteration ends when the largest ``|log(q_i / w_i^(2/p))|`` is at most this, see
            ``lewis_certificate``.
        max_iterations: most passes over the features; reaching it gives a warning.
        rank_tolerance: singular values below this share of the largest (columns scaled to a largest value of 1) count
            as 0. Default: ``max(n, d)`` times the machine epsilon of float64, or 16 times that of a narrower dtype.

    Returns:
        float64 ``[n]``.

    Raises:
        ValueError: for wrong shapes, values that are not finite, and ``p`` or a tolerance that is not above 0.

    Source: arXiv 2405.14121, definition of the Lewis weights.
    """
    check_numbers(above=0, p=p, tolerance=tolerance)
    check_numbers(least=1, whole=True, max_iterations=max_iterations)
    rows = WhitenedRows(features, rank_tolerance)
    if 0 < len(rows.kept) == rows.rank:
        warnings.warn(
            f"the {len(rows.kept)} rows of features are linearly independent, so all have the weight 1 and a draw by "
            "them is uniform: give more rows than columns",
            stacklevel=2,
        )
    log_weight = torch.full(
        (len(rows.kept),), math.log(max(rows.rank, 1) / max(len(rows.kept), 1)), dtype=torch.float64
    )
    share = 4 / (p + 2)
    gram = rows.gram((0.5 - 1 / p) * log_weight)
    for _ in range(max_iterations if rows.rank else 0):
        factor, gram, residual = torch.linalg.cholesky(gram), torch.zeros_like(gram), 0.0
        for part, block in rows.blocks():
            log_form = _log_form(factor, block)
            residual = max(residual, float((log_form - 2 / p * log_weight[part]).abs().max()))
            log_weight[part] = (1 - share) * log_weight[part] + share * p / 2 * log_form
            if p == 2:  # the weights are not on the right-hand side: these are final
                continue
            block *= ((0.5 - 1 / p) * log_weight[part]).exp_()[:, None]
            gram.addmm_(block.T, block)
        if p == 2 or residual <= tolerance:
            break
    else:
        if rows.rank:
            warnings.warn(
                f"after max_iterations={max_iterations} passes the weights for p={p} are off by up to a factor of "
                f"exp({residual:.1e}) in each step: raise max_iterations",
                stacklevel=2,
            )
    weight = log_weight.exp_()
    if len(weight) and float(weight.max()) > 1 + 1e-6:
        warnings.warn(f"a weight of {float(weight.max())} is set to 1: raise max_iterations", stacklevel=2)
    return torch.zeros(rows.count, dtype=torch.float64).index_copy_(0, rows.kept, weight.clamp_(max=1))


class LewisCertificate(NamedTuple):
    """How far weights can be from the Lewis weights.

    Attributes:
        residual: the largest ``|log(q_i / w_i^(2/p))|`` with ``q_i = a_i^T (A^T W^(1 - 2/p) A)^+ a_i``; 0 for the
            Lewis weights themselves.
        factor: for ``p < 4`` the given weights differ from the Lewis weights by at most this factor:
            ``exp(c residual)`` with ``c = 1`` for ``p <= 2`` and ``c = p / (4 - p)`` above. For ``p >= 4``, ``c`` is
            the square root of the rank, a bound only up to a constant in the exponent.
    """

    residual: float
    factor: float


def lewis_certificate(
    features: Tensor | np.ndarray, weights: Tensor | np.ndarray, p: float = 2.0, rank_tolerance: float | None = None
) -> LewisCertificate:
    """How far given weights are from the Lewis weights, from one pass over the features.

    Args:
        features: ``[n, d]``, any real dtype.
        weights: ``[n]``, from ``lewis_weights`` or anywhere else.
        p: see ``lewis_weights``.
        rank_tolerance: see ``lewis_weights``.

    Returns:
        Two floats, both infinite if a weight of a row that is not 0 is 0 or not finite.

    Raises:
        ValueError: as ``lewis_weights``, and if there is not one weight for each row.

    Source: stability lemma of arXiv 2405.14121, simplified.
    """
    check_numbers(above=0, p=p)
    rows = WhitenedRows(features, rank_tolerance)
    weights = cpu_tensor(weights).double()
    if weights.shape != (rows.count,):
        raise ValueError(f"weights must be [{rows.count}], one for each row of features, got {list(weights.shape)}")
    log_weight = weights[rows.kept].log()
    if not rows.rank:
        return LewisCertificate(0.0, 1.0)
    if not bool(log_weight.isfinite().all()):
        return LewisCertificate(math.inf, math.inf)
    factor, residual = torch.linalg.cholesky(rows.gram((0.5 - 1 / p) * log_weight)), 0.0
    for part, block in rows.blocks():
        residual = max(residual, float((_log_form(factor, block) - 2 / p * log_weight[part]).abs().max()))
    power = 1.0 if p <= 2 else p / (4 - p) if p < 4 else rows.rank**0.5
    return LewisCertificate(residual, math.exp(min(power * residual, 700)))


def max_lewis_weights(features: Sequence[Tensor | np.ndarray], p: float = 2.0, **kwargs: Any) -> Tensor:
    """For each sample the largest of its ``lewis_weights`` in the feature matrices of several networks.

    Args:
        features: one ``[n, d_j]`` for each network, of the same samples in the same order.
        p: see ``lewis_weights``.
        kwargs: ``tolerance``, ``max_iterations``, ``rank_tolerance`` of ``lewis_weights``.

    Returns:
        float64 ``[n]``; their sum is ``T`` of the paper.

    Raises:
        ValueError: as ``lewis_weights``, for an empty list and for different numbers of rows.

    Source: arXiv 2405.14121, algorithm 1, step 1.
    """
    features = list(features)
    if not features:
        raise ValueError("features must hold at least one matrix [n, d], got an empty list: give one for each network")
    counts = [len(one) for one in features]
    if len(set(counts)) > 1:
        raise ValueError(
            f"features must be of the same samples in the same order, got {counts} rows: extract them anew"
        )
    largest = lewis_weights(features[0], p, **kwargs)
    for one in features[1:]:
        largest = torch.maximum(largest, lewis_weights(one, p, **kwargs))
    return largest


class Draw(NamedTuple):
    """What ``draw_until`` drew.

    Attributes:
        draws: int64 ``[m]``, the rows in the order of the draws, with all repeats; the last one is not drawn before.
        distinct: int64 ``[budget]``, the different rows, ascending.
        loss_weight: float64 ``[budget]``, ``multiplicity / (m P)`` with the probability ``P`` of each row: the factor
            of its ``|residual|^p``, so that the sum over the drawn rows estimates the sum over all rows. (To scale the
            row itself, take the p-th root.)
        multiplicity: int64 ``[budget]``, how often each of ``distinct`` was drawn.
    """

    draws: Tensor
    distinct: Tensor
    loss_weight: Tensor
    multiplicity: Tensor

    @property
    def order(self) -> Tensor:
        """Positions in ``distinct``, int64 ``[budget]``, in the order in which the rows were first drawn."""
        _, first = np.unique(self.draws.numpy(), return_index=True)
        return torch.from_numpy(np.argsort(first, kind="stable"))


def draw_until(
    probability: Tensor | np.ndarray,
    budget: int,
    uniforms: Tensor | np.ndarray | np.random.Generator | torch.Generator,
) -> Draw:
    """Draw rows with replacement until ``budget`` different ones are drawn.

    Args:
        probability: ``[n]``, 0 or more; need not sum to 1.
        budget: number of different rows.
        uniforms: numbers in [0, 1), one for each draw, turned into rows by the cumulative sum of the probabilities; or
            a generator, from which numbers are taken in blocks, so that the last ones may be unused.

    Returns:
        ``Draw``.

    Raises:
        ValueError: for a budget below 1 or above the number of rows with a probability above 0, probabilities that are
            negative, not finite or all 0, and too few ``uniforms``.

    Source: arXiv 2405.14121, algorithm 1, steps 2 and 3.
    """
    chance = cpu_tensor(probability).double().numpy()
    if chance.ndim != 1 or not np.isfinite(chance).all() or (chance < 0).any() or not chance.any():
        raise ValueError(
            f"probability must be [n], finite, 0 or more and not all 0, got shape {list(chance.shape)}: give the "
            "largest Lewis weights"
        )
    possible = np.flatnonzero(chance)
    check_numbers(
        least=1, most=len(possible), whole=True, remedy="give no more than the rows that can be drawn", budget=budget
    )
    chance = chance[possible] / chance.sum()
    edges = chance.cumsum()
    edges /= edges[-1]
    seen, left, parts = np.zeros(len(possible), dtype=bool), budget, []
    for uniform in _uniform_blocks(uniforms, budget, max(MOST_DRAWS, 100 * len(possible))):
        place = np.minimum(edges.searchsorted(uniform, side="right"), len(possible) - 1)
        found, first = np.unique(place, return_index=True)
        first = np.sort(first[~seen[found]])
        done = len(first) >= left
        parts.append(place[: first[left - 1] + 1] if done else place)
        if done:
            break
        seen[found], left = True, left - len(first)
    draws = np.concatenate(parts)
    distinct, multiplicity = np.unique(draws, return_counts=True)
    weight = multiplicity / (len(draws) * chance[distinct])
    arrays = possible[draws], possible[distinct], weight, multiplicity.astype(np.int64)
    return Draw(*map(torch.from_numpy, arrays))


def _uniform_blocks(uniforms: Any, budget: int, most: int) -> Iterator[np.ndarray]:
    if isinstance(uniforms, np.random.Generator | torch.Generator):
        drawn, size = 0, 2 * budget + 64
        while drawn < most:
            if isinstance(uniforms, torch.Generator):
                yield torch.rand(size, dtype=torch.float64, generator=uniforms).numpy()
            else:
                yield uniforms.random(size)
            drawn += size
        raise ValueError(
            f"budget={budget} different rows were not reached in {drawn} draws, as some are rare: lower budget"
        )
    given = cpu_tensor(uniforms).double().numpy()
    if given.ndim != 1 or not ((given >= 0) & (given < 1)).all():
        raise ValueError(f"uniforms must be [m] numbers of at least 0 and below 1, got shape {list(given.shape)}")
    yield given
    raise ValueError(f"uniforms holds {len(given)} numbers, which is too few for budget={budget}: give more")


def _log_form(factor: Tensor, block: Tensor) -> Tensor:
    """``log(x^T G^-1 x)`` of each row ``x`` of ``block`` ``[b, r]``; ``factor`` is the Cholesky factor of ``G``."""
    solved = torch.linalg.solve_triangular(factor, block.T, upper=False)
    return solved.square_().sum(0).clamp_(min=torch.finfo(solved.dtype).tiny).log_()
