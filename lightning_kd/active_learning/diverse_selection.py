"""Choosing samples that differ from one another: k-center greedy and BADGE, in O(N D) memory.

Ozan Sener, Silvio Savarese. Active Learning for Convolutional Neural Networks: A Core-Set Approach. ICLR 2018, arXiv
1708.00489. Jordan T. Ash, Chicheng Zhang, Akshay Krishnamurthy, John Langford, Alekh Agarwal. Deep Batch Active
Learning by Diverse, Uncertain Gradient Lower Bounds. ICLR 2020, arXiv 1906.03671.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_kd.argument_checks import check_numbers

__all__ = ["badge_select", "k_center_greedy"]

BLOCK = 1024  # candidates whose distances are updated after each pick
CHUNK = 2**22  # most distances in memory at once


class Picks(NamedTuple):
    """The picked rows, in the order of the picks.

    Attributes:
        row: int64 ``[n]``, rows of the pool, each once.
        score: float64 ``[n]``, measured just before the pick. For k-center: the distance to the nearest centre. For
            BADGE: the squared distance to the nearest earlier pick; for the first pick its squared norm.
    """

    row: Tensor
    score: Tensor


def k_center_greedy(pool: Tensor, labelled: Tensor, budget: int) -> Tensor:
    """K-center greedy: pick the row that is farthest from its nearest centre, make it a centre, and repeat.

    The picks cover the pool: the largest distance of a row to its nearest centre is at most twice the smallest value
    that any choice of ``budget`` rows could reach. Equal distances: the smaller index. No row is picked twice, even if
    several are equal.

    The picks are those of the plain algorithm, found faster: distances only decrease with more centres, so old ones
    are upper bounds, and only a block of the farthest rows is updated, until a row outside the block could be
    farther than the best in it. Distances come from inner products (float32 for float32 rows); among rows that these
    cannot tell apart, differences in float64 decide.

    Args:
        pool: ``[N, D]``, float32 or float64; half precision is computed in float32.
        labelled: ``[L, D]``, the centres at the start; with ``L = 0`` row 0 is picked first.
        budget: number of picks, 0 or more; more than ``N`` gives all rows.

    Returns:
        int64 ``[min(budget, N)]``, in the order of the picks.

    Raises:
        ValueError: for wrong shapes, values that are not finite, or a negative budget.

    Source: arXiv 1708.00489, algorithm 1.
    """
    return k_center_picks(pool, labelled, budget).row


def k_center_picks(pool: Tensor, labelled: Tensor, budget: int) -> Picks:
    """``k_center_greedy`` with the distance of each pick to its nearest centre; infinite if there is no centre yet.

    Args:
        pool: see ``k_center_greedy``.
        labelled: likewise.
        budget: likewise.
    """
    pool, budget = _rows("pool", pool), _count(budget, len(pool))
    labelled = _rows("labelled", labelled) if labelled.numel() else pool.new_empty(0, pool.shape[1])
    if labelled.shape[1] != pool.shape[1]:
        raise ValueError(
            f"labelled has {labelled.shape[1]} features a row, expected {pool.shape[1]} as pool has: take both from "
            "one layer of one network"
        )
    wide = torch.promote_types(pool.dtype, labelled.dtype)
    return _FarthestFirst(pool.to(wide), labelled.to(wide), budget).run()


class _FarthestFirst:
    """The state of one run of k-center greedy.

    ``moved`` are the rows minus their mean. ``near`` are squared distances, from inner products, of each row to the
    nearest of the first ``met`` centres: an upper bound of the distance to the nearest of all. ``pool`` and ``centre``
    are the rows as given, for exact differences.
    """

    def __init__(self, pool: Tensor, labelled: Tensor, budget: int) -> None:
        # without the shift, inner products of rows far from the origin would lose their precision
        shift = pool.mean(0) if len(pool) else pool.new_zeros(pool.shape[1])
        self.pool, self.moved = pool, pool - shift
        self.norm = _square_norms(self.moved)
        self.budget, self.known = budget, len(labelled)
        self.centre = torch.cat([labelled, pool.new_empty(budget, pool.shape[1])])
        self.moved_centre = self.centre - shift
        self.centre_norm = _square_norms(self.moved_centre)
        self.near = torch.full_like(self.norm, torch.inf)
        self.met = torch.zeros(len(pool), dtype=torch.int64)
        # bound of the rounding error of a product, relative to the norms; grows about as the root of the width
        self.slack = (16 + pool.shape[1] ** 0.5) * torch.finfo(pool.dtype).eps
        self.index: list[int] = []
        self.score: list[float] = []

    def run(self) -> Picks:
        if self.budget and not self.known:
            self.pick(0, torch.inf)
        size, picks = BLOCK, 0
        while (before := len(self.index)) < self.budget:
            if picks < size // 8:  # the upper bounds have become too loose
                self.meet(torch.arange(len(self.pool)))
            self.pick_within(min(size, len(self.pool)))
            picks = len(self.index) - before
            size *= 2 if picks == 0 else 1  # no pick: too many rows are equally far
        return Picks(torch.tensor(self.index, dtype=torch.int64), torch.tensor(self.score, dtype=torch.float64))

    def pick(self, row: int, score: float) -> None:
        place = self.known + len(self.index)
        self.centre[place], self.moved_centre[place] = self.pool[row], self.moved[row]
        self.centre_norm[place] = self.norm[row]
        self.near[row] = -torch.inf
        self.index.append(row)
        self.score.append(score)

    def meet(self, row: Tensor) -> None:
        """Update ``near`` of the given rows with the centres that they were not compared with yet."""
        end = self.known + len(self.index)
        met = self.met[row]
        for seen in met.unique().tolist():
            centre, norm = self.moved_centre[seen:end], self.centre_norm[seen:end]
            for part in row[met == seen].split(max(1, CHUNK // max(1, len(centre), self.pool.shape[1]))):
                if len(centre):
                    value = torch.addmm(norm, self.moved[part], centre.T, alpha=-2).amin(1)
                    self.near[part] = torch.minimum(self.near[part], value.add_(self.norm[part]).clamp_min_(0))
        self.met[row] = end

    def pick_within(self, size: int) -> None:
        """Pick as long as the farthest of all rows must be among the ``size`` rows that are farthest now."""
        values, block = (self.near + self.rounding(self.near, self.norm)).topk(min(size + 1, len(self.near)))
        outside = values[size].item() if size < len(self.near) else -torch.inf
        block = block[:size].sort().values
        self.meet(block)
        near, norm = self.near[block], self.norm[block]
        slack = self.rounding(near, norm)
        if not len(block) or (near - slack).max().item() <= outside:
            return
        block = block[near + slack > outside]  # other rows cannot be picked in this call
        near, norm, rows, exact = self.near[block], self.norm[block], self.moved[block], self.nearest(block)
        while len(block) and len(self.index) < self.budget:
            slack = self.rounding(near, norm)
            if (least := (near - slack).max()).item() <= outside:
                return
            close = (near + slack >= least).nonzero()[:, 0]
            spot = int(close[int(exact[close].numpy().argmax())])  # the first of equal ones
            if exact[spot] == 0 and outside == -torch.inf:  # all rows that are left are copies of centres
                rest = block[near > -torch.inf][: self.budget - len(self.index)].tolist()
                self.index += rest
                self.score += [0.0] * len(rest)
                return
            self.pick(int(block[spot]), float(exact[spot]) ** 0.5)
            value = torch.addmv(norm + norm[spot], rows, rows[spot], alpha=-2).clamp_min_(0)
            torch.minimum(near, value, out=near)
            near[spot] = -torch.inf
            closer = (value - self.rounding(value, norm) < exact).nonzero()[:, 0]  # now perhaps nearest to this pick
            apart = (self.pool[block[closer]].double() - self.pool[block[spot]].double()).square_().sum(1)
            exact[closer] = torch.minimum(exact[closer], apart)
            if len(self.index) % 32 == 0:
                kept = near + slack > outside
                block, near, norm, rows, exact = (part[kept] for part in (block, near, norm, rows, exact))

    def rounding(self, near: Tensor, norm: Tensor) -> Tensor:
        """Bound of the rounding error of squared distances."""
        return (near.clamp_min(0) + norm).mul_(self.slack)

    def nearest(self, row: Tensor) -> Tensor:
        """Exact squared distances of rows to their nearest centres, where products leave it open which those are."""
        end = self.known + len(self.index)
        exact = []
        for part in row.split(max(1, CHUNK // end)):
            norm = self.norm[part]
            value = torch.addmm(self.centre_norm[:end], self.moved[part], self.moved_centre[:end].T, alpha=-2)
            value = value.add_(norm[:, None]).clamp_min_(0)
            least = value.amin(1)
            limit = least + 3 * self.slack * (least + norm)  # rounding of both distances
            which, centre = (value <= limit[:, None]).nonzero().unbind(1)
            unmet = torch.full_like(norm, torch.inf, dtype=torch.float64)
            exact.append(unmet.scatter_reduce_(0, which, self.apart(part[which], centre), "amin"))
        return torch.cat(exact)

    def apart(self, row: Tensor, centre: Tensor) -> Tensor:
        """Squared distances float64 of rows ``row[k]`` to centres ``centre[k]``, by differences in float64."""
        step = max(1, CHUNK // max(1, self.pool.shape[1]))
        pairs = zip(row.split(step), centre.split(step), strict=True)
        return torch.cat([(self.pool[i].double() - self.centre[j].double()).square_().sum(1) for i, j in pairs])


def badge_select(probabilities: Tensor, feature: Tensor, budget: int, generator: np.random.Generator) -> Tensor:
    """BADGE: k-means++ seeding on the gradients that samples would give to the weights of the classifier.

    Samples are picked whose gradients are large (uncertain samples) and different (diverse samples). The gradient
    embedding of a sample is ``outer(onehot(argmax p) - p, feature)``: minus the gradient of the cross-entropy for the
    predicted class. The largest is picked first; each further sample is drawn, without replacement, with a probability
    proportional to its squared distance to the nearest pick. Distances are computed in float64 from the two factors of
    the outer product, without vectors of size ``K * D``.

    A sample whose ``p`` is one-hot up to float32's resolution has no gradient and is drawn only when no others are
    left. If all distances are 0, the rest is drawn uniformly.

    Args:
        probabilities: ``[N, K]``.
        feature: ``[N, D]``, the input of the classifier.
        budget: number of picks, 0 or more; more than ``N`` gives all.
        generator: source of random numbers; one for each pick after the first.

    Returns:
        int64 ``[min(budget, N)]``, in the order of the picks.

    Raises:
        ValueError: for wrong shapes, values that are not finite, or a negative budget.

    Source: arXiv 1906.03671, algorithm 1.
    """
    return badge_picks(probabilities, feature, budget, generator).row


def badge_picks(probabilities: Tensor, feature: Tensor, budget: int, generator: np.random.Generator) -> Picks:
    """``badge_select`` with the squared distance of each pick to the nearest earlier one; the first: squared norm.

    Args:
        probabilities: see ``badge_select``.
        feature: likewise.
        budget: likewise.
        generator: likewise.
    """
    residual, feature = _residual(_rows("probabilities", probabilities)), _rows("feature", feature).double()
    if len(residual) != len(feature):
        raise ValueError(f"feature must have a row for each of the {len(residual)} probabilities, got {len(feature)}")
    budget = _count(budget, len(feature))
    norm = _square_norms(residual) * _square_norms(feature)
    index: list[int] = []
    score: list[float] = []
    left = torch.ones(len(norm), dtype=torch.bool)
    near = norm
    for k in range(budget):
        row = _draw(near, left, generator) if k else int(norm.numpy().argmax())
        index.append(row)
        score.append(float(near[row]))
        distance = _gradient_distance(residual, feature, norm, row)
        near = torch.minimum(near, distance) if k else distance
        # a sample without gradient is not informative, however far it is from the others
        near.masked_fill_(norm == 0, 0)
        near[row], left[row] = 0, False
    return Picks(torch.tensor(index, dtype=torch.int64), torch.tensor(score, dtype=torch.float64))


def _residual(probabilities: Tensor) -> Tensor:
    """``onehot(argmax p) - p``, float64 ``[N, K]``; a row is 0 if all of it is below float32's resolution."""
    residual = -probabilities.double()
    residual[torch.arange(len(residual)), probabilities.argmax(1)] += 1
    sure = residual.abs().amax(1, keepdim=True) < torch.finfo(torch.float32).eps / 2
    return residual.masked_fill_(sure, 0)


def _gradient_distance(residual: Tensor, feature: Tensor, norm: Tensor, row: int) -> Tensor:
    """Squared distance ``[N]`` of all gradient embeddings ``outer(residual, feature)`` to that of one row."""
    both = norm + norm[row]
    distance = torch.addcmul(both, residual @ residual[row], feature @ feature[row], value=-2)
    return distance.masked_fill_(distance <= 8 * torch.finfo(distance.dtype).eps * both, 0)  # rounding error alone


def _draw(weight: Tensor, left: Tensor, generator: np.random.Generator) -> int:
    """Draw a position with a probability proportional to ``weight``; if all are 0, uniformly among ``left``."""
    total = weight.numpy().cumsum()
    if total[-1] <= 0:
        total = left.numpy().astype(np.float64).cumsum()
    place = int(total.searchsorted(generator.random() * total[-1], side="right"))
    return min(place, int(total.searchsorted(total[-1])))  # rounding may give a position past the last weight above 0


def _square_norms(rows: Tensor) -> Tensor:
    return torch.cat([part.square().sum(1) for part in rows.split(BLOCK)])  # einsum has ten times the rounding error


def _rows(name: str, rows: Tensor) -> Tensor:
    """``rows`` on the CPU as float32 or wider."""
    if rows.ndim != 2:
        raise ValueError(f"{name} must be [N, D], got {list(rows.shape)}: give one row for each")
    rows = rows.detach().cpu()
    rows = rows if rows.dtype == torch.float64 else rows.double() if not rows.is_floating_point() else rows.float()
    if not bool(_square_norms(rows).isfinite().all()):
        raise ValueError(f"{name} must be finite, got NaN or infinite values, or overflowing squares: look at training")
    return rows


def _count(budget: int, most: int) -> int:
    check_numbers(least=0, whole=True, budget=budget)
    return min(budget, most)
