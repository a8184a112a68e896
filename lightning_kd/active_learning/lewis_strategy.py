"""One query for all networks at once: samples are drawn by the largest Lewis weight that they have in any of them."""

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
    """Draw with a probability proportional to the largest Lewis weight in any representation, until the budget is met.

    It asks once, with all of the budget, before any of the labels is known. What is drawn comes in the order of the
    draws, so that the first ones are a smaller query of the same kind; the score is the largest weight. With the loss
    weights of the query the sum over what was drawn estimates that over the pool, for each of the networks:
    ``Classification(use_sampling_weights=True)``.

    Args:
        p: of the loss ``|residual|^p`` that the draw is for.
        bias: whether the linear layer on the features has a bias; then each representation has a column of ones.

    Raises:
        ValueError: for ``p`` below 1; in ``select`` for a budget of more than half of the pool, which would take very
            many draws.

    Source: arXiv 2405.14121, algorithm 1.
    """

    needs_features = True
    asks_once = True

    def __init__(self, p: float = 2.0, bias: bool = True) -> None:
        check_numbers(least=1, p=p)
        self.p = p
        self.bias = bias

    def select(
        self, scores: Mapping[str, Tensor], pool: PoolView, budget: int, generator: np.random.Generator
    ) -> Query:
        parts = representations_in(scores)
        if not parts:
            raise ValueError(f"scores must hold 'feature', got {sorted(scores)}: let the task's features be tapped")
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
