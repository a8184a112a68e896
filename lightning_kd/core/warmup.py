"""A learning rate schedule: a linear warm-up, then half a cosine.

torch's ``SequentialLR`` of a ``LinearLR`` and another schedule does the same, but cannot be written in a configuration
file: its parts need the optimizer as an argument.
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
    """A linear warm-up, then half a cosine down to ``eta_min``. For ``lr_interval: step``.

    With ``lr_interval: epoch`` both lengths are epochs. After the end the rate stays at ``eta_min``. Each parameter
    group starts at ``start_factor`` of its own rate; all end at ``eta_min``.

    Args:
        optimizer: wrapped optimizer.
        warmup_steps: steps until the full rate; 0: no warm-up.
        total_steps: steps until the end of the cosine, including the warm-up. Default: those of the training, see
            ``TiedSchedule``.
        start_factor: the rate of the first step as a share of the full rate, in (0, 1].
        eta_min: the rate at the end.

    Raises:
        ValueError: for a number out of range, and for ``total_steps`` not above ``warmup_steps``.
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
                f"warmup_steps={self.warmup_steps} is not less than the length of the training, {length}, so the full "
                "learning rate is never reached: give fewer, and lr_interval: step to count in steps"
            )

    def rates(self, epoch: int, length: int) -> list[Any]:
        if epoch < self.warmup_steps:
            share = self.start_factor + (1 - self.start_factor) * epoch / self.warmup_steps
            return [base * share for base in self.base_lrs]
        done = min((epoch - self.warmup_steps) / (length - self.warmup_steps), 1.0)
        share = (1 + math.cos(math.pi * done)) / 2
        return [self.eta_min + (base - self.eta_min) * share for base in self.base_lrs]
