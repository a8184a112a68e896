"""The strategy ``lewis``: one query for several networks, drawn by the largest Lewis weight of each sample."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from lightning_kd.active_learning.lewis import draw_until, max_lewis_weights
from lightning_kd.active_learning.representations import representations_in
from lightning_kd.active_learning.strategies import Strategy
from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.notes import note
from lightning_kd.pool import PoolView, Query

__all__ = ["Lewis"]


class Lewis(Strategy):
    """One query that serves several networks (Huang et al., ICLR 2024, arXiv 2405.14121).

    Samples are drawn with a probability proportional to the largest Lewis weight that they have in the features of any
    of the networks, until ``budget`` different ones are drawn. Samples that are unlike all others in the features of
    one network are therefore likely to be in the query.

    The whole budget goes into one query, before any label is known. The query is in the order of the draws, so its
    first samples are a smaller query of the same kind; the score is the largest weight. Its loss weights make the sum
    of the losses over the query an estimate of the sum over the pool, for each network: train with
    ``Classification(use_sampling_weights=True)``.

    Args:
        p: exponent of the loss ``|residual|^p``, 1 or more.
        bias: whether the linear layer on the features has a bias; if so, a column of ones is added to the features.

    Raises:
        ValueError: for ``p`` below 1; in ``select`` for a budget of more than half of the samples that can be drawn,
            which would take very many draws.

    Source: arXiv 2405.14121, algorithm 1.
    """

    needs_features = True
    single_query = True

    def __init__(self, p: float = 2.0, bias: bool = True) -> None:
        check_numbers(least=1, p=p)
        self.p = p
        self.bias = bias

    def select(
        self, scores: Mapping[str, Tensor], pool: PoolView, budget: int, generator: np.random.Generator
    ) -> Query:
        parts = representations_in(scores)
        if not parts:
            raise ValueError(
                f"scores must hold 'feature', got {sorted(scores)}: let the task's pool_scores give the features"
            )
        if self.bias:
            parts = [torch.cat([part, part.new_ones(len(part), 1)], 1) for part in parts]
        largest = max_lewis_weights(parts, self.p, tolerance=1e-6)
        possible = int((largest > 0).sum())
        if budget > possible / 2:
            raise ValueError(
                f"budget={budget} is more than half of the {possible} samples that can be drawn, which takes very many "
                "draws: lower it, or label everything"
            )
        drawn = draw_until(largest, budget, generator)
        note(
            f"lewis: {budget} samples in {len(drawn.draws)} draws from {len(pool.unlabelled)}; the largest weights in "
            f"{len(parts)} representations sum to {float(largest.sum()):.1f}"
        )
        row, weight = drawn.distinct[drawn.order], drawn.loss_weight[drawn.order]
        return Query(pool.unlabelled[row.numpy()], largest[row].numpy(), weight.numpy())
