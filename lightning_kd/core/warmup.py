"""A learning rate that rises linearly over the first steps, and then falls as half a cosine.

torch's own way, ``SequentialLR`` of a ``LinearLR`` and another schedule, can be built in Python alone: its parts need
the optimizer, which a configuration file cannot name.
"""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.schedules import TiedSchedule

__all__ = ["WarmupCosine"]


class WarmupCosine(TiedSchedule):
    """A linear warm-up by steps, then half a cosine down to ``eta_min``, which then stays. For ``lr_interval: step``.

    With ``lr_interval: epoch`` both lengths are epochs. Each group of an optimizer begins at a share of its own rate;
    all end at ``eta_min``.

    Args:
        optimizer: wrapped optimizer.
        warmup_steps: steps until the full rate; 0 is none.
        total_steps: steps until the end of the cosine, the warm-up included. Default: those of the training, see
            ``TiedSchedule``.
        start_factor: the share of the full rate that the first step has, above 0 to 1.
        eta_min: the rate at the end.

    Raises:
        ValueError: for a number out of its range, and ``total_steps`` that leave no step after the warm-up.
    """

    length_name = "total_steps"

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: int = 500,
        total_steps: int | None = None,
        start_factor: float = 0.01,
        eta_min: float = 0.0,
    ) -> None:
        check_numbers(least=0, whole=True, warmup_steps=warmup_steps)
        check_numbers(above=warmup_steps, whole=True, optional=True, total_steps=total_steps)
        check_numbers(above=0, most=1, start_factor=start_factor)
        check_numbers(least=0, eta_min=eta_min)
        self.warmup_steps = warmup_steps
        self.to_the_end = total_steps is None
        self.total_steps = total_steps
        self.start_factor = start_factor
        self.eta_min = eta_min
        super().__init__(optimizer)

    def length_in(self, training: int) -> int:
        return max(training, self.warmup_steps + 1)

    def set_length(self, length: int) -> None:
        super().set_length(length)
        if self.to_the_end and length <= self.warmup_steps:
            rank_zero_warn(
                f"warmup_steps={self.warmup_steps} is not less than the length of the training, {length}, so that the "
                "full learning rate is never reached: give fewer, and lr_interval: step to count in steps"
            )

    def rates(self, epoch: int, length: int) -> list[Any]:
        if epoch < self.warmup_steps:
            share = self.start_factor + (1 - self.start_factor) * epoch / self.warmup_steps
            return [base * share for base in self.base_lrs]
        done = min((epoch - self.warmup_steps) / (length - self.warmup_steps), 1.0)
        share = (1 + math.cos(math.pi * done)) / 2
        return [self.eta_min + (base - self.eta_min) * share for base in self.base_lrs]
