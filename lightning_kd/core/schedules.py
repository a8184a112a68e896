"""Learning rate schedules that torch cannot build from a configuration file."""

from __future__ import annotations

import math
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class ConstantThenCosine(LRScheduler):
    """A constant learning rate, then half a cosine down to ``eta_min``, which then stays.

    Args:
        optimizer: wrapped optimizer.
        constant_epochs: epochs (steps, where it steps once a step) at the full rate before the cosine begins; the
            first epoch of the cosine is at the full rate too.
        cosine_epochs: length of the cosine.
        eta_min: the rate at its end.

    Raises:
        ValueError: for ``constant_epochs`` below 0 or ``cosine_epochs`` below 1.
    """

    def __init__(self, optimizer: Optimizer, constant_epochs: int, cosine_epochs: int, eta_min: float = 0.0) -> None:
        if constant_epochs < 0:
            raise ValueError(f"constant_epochs must be at least 0, got {constant_epochs}: give 0 for none")
        if cosine_epochs < 1:
            raise ValueError(f"cosine_epochs must be at least 1, got {cosine_epochs}: give the length of the descent")
        self.constant_epochs = constant_epochs
        self.cosine_epochs = cosine_epochs
        self.eta_min = eta_min
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        done = min(max(self.last_epoch - self.constant_epochs, 0) / self.cosine_epochs, 1.0)
        share = (1 + math.cos(math.pi * done)) / 2
        return [self.eta_min + (base - self.eta_min) * share for base in self.base_lrs]
