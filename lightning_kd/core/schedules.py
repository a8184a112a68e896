"""Learning rate schedules that torch cannot build from a configuration file."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from lightning_kd.argument_checks import check_numbers


class ConstantThenCosine(LRScheduler):
    """A constant learning rate, then half a cosine down to ``eta_min``, which then stays.

    Args:
        optimizer: wrapped optimizer.
        constant_epochs: epochs (steps, where it steps once a step) at the full rate before the cosine begins; the
            first epoch of the cosine is at the full rate too.
        cosine_epochs: length of the cosine. Default: what is left of the training.
        eta_min: the rate at its end.

    Raises:
        ValueError: for ``constant_epochs`` or ``eta_min`` below 0 or ``cosine_epochs`` below 1.
    """

    def __init__(
        self, optimizer: Optimizer, constant_epochs: int, cosine_epochs: int | None = None, eta_min: float = 0.0
    ) -> None:
        check_numbers(least=0, whole=True, constant_epochs=constant_epochs)
        check_numbers(least=1, whole=True, optional=True, cosine_epochs=cosine_epochs)
        check_numbers(least=0, eta_min=eta_min)
        self.constant_epochs = constant_epochs
        self.to_the_end = cosine_epochs is None
        self.cosine_epochs = cosine_epochs or 1
        self.eta_min = eta_min
        super().__init__(optimizer)

    def set_length(self, length: int) -> None:
        """Be told how long the training is, in epochs (or steps)."""
        if self.to_the_end:
            self.cosine_epochs = max(1, length - self.constant_epochs)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        own = {"cosine_epochs": self.cosine_epochs} if self.to_the_end else {}  # of this training
        super().load_state_dict({**state_dict, "to_the_end": self.to_the_end, **own})

    def get_lr(self) -> list[Any]:
        done = min(max(self.last_epoch - self.constant_epochs, 0) / self.cosine_epochs, 1.0)
        share = (1 + math.cos(math.pi * done)) / 2
        return [self.eta_min + (base - self.eta_min) * share for base in self.base_lrs]


class CosineAnnealing(CosineAnnealingLR):
    """torch's ``CosineAnnealingLR``, by default as long as the training: one number for both.

    A resumed training of another length goes on from the rate that it had, and ends at ``eta_min`` all the same.

    Args:
        optimizer: wrapped optimizer.
        T_max: epochs (steps, where it steps once a step) of the descent. Default: those of the training.
        eta_min: the rate at its end.

    Raises:
        ValueError: for ``T_max`` below 1 or ``eta_min`` below 0.
    """

    def __init__(self, optimizer: Optimizer, T_max: int | None = None, eta_min: float = 0.0) -> None:
        check_numbers(least=1, whole=True, optional=True, T_max=T_max)
        check_numbers(least=0, eta_min=eta_min)
        self.to_the_end = T_max is None
        super().__init__(optimizer, T_max or 1, eta_min)

    def set_length(self, length: int) -> None:
        """Be told how long the training is, in epochs (or steps)."""
        if self.to_the_end:
            self.T_max = length

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        own = {"T_max": self.T_max} if self.to_the_end else {}  # of this training, not of the one before
        super().load_state_dict({**state_dict, "to_the_end": self.to_the_end, **own})


def warn_of_another_length(schedule: LRScheduler, length: int) -> None:
    """Say where a cosine does not end with the training: it would stop at a high rate, or rise again.

    Args:
        schedule: any; only a cosine has an end.
        length: of the training, in epochs.
    """
    if getattr(schedule, "to_the_end", False):
        return
    if isinstance(schedule, CosineAnnealingLR):
        own, names = schedule.T_max, "T_max"
    elif isinstance(schedule, ConstantThenCosine):
        own, names = schedule.constant_epochs + schedule.cosine_epochs, "constant_epochs + cosine_epochs"
        if own < length:  # stays at its end
            return
    else:
        return
    if own != length:
        effect = "ends at a high learning rate" if own > length else "raises the learning rate again"
        own_length = names == "T_max"
        other = ", or take lightning_kd.core.schedules.CosineAnnealing, as long as the training" if own_length else ""
        rank_zero_warn(
            f"{type(schedule).__name__} has {names} {own}, the training has {length} epochs, so it {effect}: set "
            f"{names} to {length}{other}"
        )
