"""Polynomial decay of the learning rate, as in segmentation papers."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.schedules import TiedSchedule

__all__ = ["PolynomialDecay"]


class PolynomialDecay(TiedSchedule):
    """Polynomial decay: the rate is ``lr * (1 - step / total_steps) ** power``, with steps counted from 0.

    For ``lr_interval: step``; with ``lr_interval: epoch`` its length is in epochs. Unlike torch's ``PolynomialLR`` it
    is by default as long as the training.

    Args:
        optimizer: wrapped optimizer.
        total_steps: steps until the rate is 0, where it stays. Default: those of the training, see ``TiedSchedule``.
        power: above 0; 1 is a linear decay.

    Raises:
        ValueError: for a number out of range.
    """

    length_name = "total_steps"

    def __init__(self, optimizer: Optimizer, total_steps: int | None = None, power: float = 0.9) -> None:
        check_numbers(least=1, whole=True, optional=True, total_steps=total_steps)
        check_numbers(above=0, power=power)
        self.to_the_end = total_steps is None
        self.total_steps = total_steps
        self.power = power
        super().__init__(optimizer)

    def rates(self, epoch: int, length: int) -> list[Any]:
        return [base * (1 - min(epoch / length, 1.0)) ** self.power for base in self.base_lrs]
