"""The one-cycle schedule: the learning rate rises by half a cosine and falls by another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.schedules import TiedSchedule

__all__ = ["OneCycle"]


class OneCycle(TiedSchedule):
    """torch's ``OneCycleLR``, by default as long as the training. For ``lr_interval: step``.

    The highest rate is the optimizer's own. With a method of two stages, such as CAP, the second stage has a second
    cycle.

    Args:
        optimizer: wrapped optimizer; its rates are the highest ones.
        total_steps: steps (epochs, with ``lr_interval: epoch``) of all cycles together. Default: those of the training,
            see ``TiedSchedule``.
        pct_start: share of a cycle in which the rate rises, in (0, 1).
        div_factor: the rate at the start is the highest divided by this.
        final_div_factor: the rate at the end is that at the start divided by this.
        cycle_momentum: let the momentum (the first beta of Adam) fall from ``max_momentum`` to ``base_momentum`` while
            the rate rises, and rise while it falls.
        base_momentum: the lowest momentum.
        max_momentum: the highest momentum.
        stretch: the length of a cycle in multiples of its stage; with more than 1 the stage ends before the cycle does:
            5 for a cycle of 80 epochs of which 16 are trained. A list has one number for each stage.

    Raises:
        ValueError: for a number out of range, and for an optimizer without momentum.
    """

    length_name = "total_steps"

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int | None = None,
        pct_start: float = 0.2,
        div_factor: float = 25.0,
        final_div_factor: float = 1e4,
        cycle_momentum: bool = True,
        base_momentum: float = 0.85,
        max_momentum: float = 0.95,
        stretch: float | Sequence[float] = 1.0,
    ) -> None:
        check_numbers(least=1, whole=True, optional=True, total_steps=total_steps)
        check_numbers(above=0, below=1, pct_start=pct_start)
        check_numbers(above=0, div_factor=div_factor, final_div_factor=final_div_factor)
        check_numbers(least=0, below=1, base_momentum=base_momentum, max_momentum=max_momentum)
        stages = [stretch] if isinstance(stretch, int | float) else list(stretch)
        for share in stages:
            check_numbers(least=1, stretch=share)
        if cycle_momentum and not {"momentum", "betas"} & optimizer.param_groups[0].keys():
            raise ValueError(f"cycle_momentum needs a momentum, {type(optimizer).__name__} has none: give false")
        self.to_the_end = total_steps is None
        self.total_steps = total_steps
        self.pct_start, self.div_factor, self.final_div_factor = pct_start, div_factor, final_div_factor
        self.cycle_momentum, self.base_momentum, self.max_momentum = cycle_momentum, base_momentum, max_momentum
        self.stretch = stages
        self.second_stage: int | None = None
        super().__init__(optimizer)

    def set_second_stage(self, begin: int | None) -> None:
        """Set the step (or epoch) with which a second cycle begins; ``None``: one cycle."""
        self.second_stage = begin or None

    def place(self, epoch: int, length: int) -> tuple[float, bool]:
        """``(share, rises)``: how much of the rise or fall is done at ``epoch``, in [0, 1], and which it is."""
        begin, end, stage = 0, length, 0
        if self.second_stage is not None:
            later = epoch >= self.second_stage
            begin, end, stage = (self.second_stage, length, 1) if later else (0, min(self.second_stage, length), 0)
        cycle = max(1, round((end - begin) * self.stretch[min(stage, len(self.stretch) - 1)]))
        step, peak = epoch - begin, self.pct_start * cycle - 1
        if step <= max(peak, 0):
            return (step / peak if step else 0.0), True
        return min((step - max(peak, 0)) / (cycle - 1 - max(peak, 0)), 1.0) if cycle > 1 else 1.0, False

    def rates(self, epoch: int, length: int) -> list[Any]:
        share, rises = self.place(epoch, length)
        low, end = 1 / self.div_factor, 1 / (self.div_factor * self.final_div_factor)
        part = _between(low, 1.0, share) if rises else _between(1.0, end, share)
        return [base * part for base in self.base_lrs]

    def get_lr(self) -> list[Any]:
        length = self.known_length() if self.last_epoch > 0 else 1
        self._set_momentum(length)
        return self.rates(self.last_epoch, length)

    def _stretch(self, before: int, now: int) -> None:
        super()._stretch(before, now)
        self._set_momentum(now)

    def _set_momentum(self, length: int) -> None:
        """Set the momentum of this epoch, in a schedule of length ``length``."""
        if not self.cycle_momentum:
            return
        share, rises = self.place(self.last_epoch, length)
        ends = (self.max_momentum, self.base_momentum)
        momentum = _between(*(ends if rises else ends[::-1]), share)
        for group in self.optimizer.param_groups:
            if "betas" in group:
                group["betas"] = (momentum, *group["betas"][1:])
            else:
                group["momentum"] = momentum


def _between(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * share))
