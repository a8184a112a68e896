"""Learning rate schedules that are as long as the training, without giving the length in a configuration file."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ChainedScheduler, CosineAnnealingLR, LRScheduler, SequentialLR

from lightning_kd.argument_checks import check_numbers


class TiedSchedule(LRScheduler):
    """The base class of schedules that end with the training unless a length is given; the task sets the length.

    If a training is resumed with another number of epochs, the rate is from then on that of a whole training with the
    new number.

    Attributes:
        to_the_end: whether it ends with the training.
        raised: rates of the last trained and of the next epoch, if a resume with another length raises the rate; else
            ``None``.
    """

    #: name of the attribute with its length, which is ``None`` until it is known
    length_name = "T_max"
    to_the_end: bool
    raised: tuple[float, float] | None = None

    def rates(self, epoch: int, length: int) -> list[Any]:
        """The rate of each parameter group in ``epoch``, counted from 0, for a schedule of length ``length``."""
        raise NotImplementedError(f"{type(self).__name__} must implement rates(epoch, length)")

    def length_in(self, training: int) -> int:
        """The length of the schedule in a training of ``training`` epochs (or steps)."""
        return training

    def set_length(self, length: int) -> None:
        """Set the length of the training, in epochs (or steps)."""
        if self.to_the_end:
            setattr(self, self.length_name, self.length_in(length))

    def known_length(self) -> int:
        """The length of the schedule.

        Raises:
            ValueError: if it was not set.
        """
        length: int | None = getattr(self, self.length_name)
        if length is None:
            name = type(self).__name__
            raise ValueError(
                f"{name} ends with the training, whose length is not set: give it to a task as lr_scheduler, "
                f"alone or in SequentialLR or ChainedScheduler, or set {self.length_name}"
            )
        return length

    def get_lr(self) -> list[Any]:
        return self.rates(self.last_epoch, self.known_length() if self.last_epoch > 0 else 1)

    def state_dict(self) -> dict[str, Any]:
        return {key: value for key, value in super().state_dict().items() if key != "raised"}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        now, before = getattr(self, self.length_name), state_dict.get(self.length_name)
        own = {self.length_name: now} if self.to_the_end and now is not None else {}  # keep this training's length
        super().load_state_dict({**state_dict, "to_the_end": self.to_the_end, **own})
        self.raised = None
        if own and before is not None and before != now and self.last_epoch > 0:
            self._stretch(before, now)

    def _stretch(self, before: int, now: int) -> None:
        """Set the rate of this epoch to that of a schedule of length ``now``, after one of length ``before``."""
        old, new = self.rates(self.last_epoch, before), self.rates(self.last_epoch, now)
        for group, was, rate in zip(self.optimizer.param_groups, old, new, strict=True):
            if was > 0:
                rate = rate * (float(group["lr"]) / was)  # keeps the factor of other schedules in a chain
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]
        trained, next_ = max(self.rates(self.last_epoch - 1, before)), max(new)
        if next_ > max(trained, *old):  # not the ordinary rise of a warm-up
            self.raised = trained, next_


class ConstantThenCosine(TiedSchedule):
    """A constant learning rate, then half a cosine down to ``eta_min``, where it stays.

    Args:
        optimizer: wrapped optimizer.
        constant_epochs: epochs (steps, with ``lr_interval: step``) at the full rate before the cosine begins; the first
            epoch of the cosine is at the full rate too.
        cosine_epochs: length of the cosine. Default: the rest of the training, see ``TiedSchedule``.
        eta_min: the rate at the end.

    Raises:
        ValueError: for ``constant_epochs`` or ``eta_min`` below 0 or ``cosine_epochs`` below 1.
    """

    length_name = "cosine_epochs"

    def __init__(
        self, optimizer: Optimizer, constant_epochs: int, cosine_epochs: int | None = None, eta_min: float = 0.0
    ) -> None:
        check_numbers(least=0, whole=True, constant_epochs=constant_epochs)
        check_numbers(least=1, whole=True, optional=True, cosine_epochs=cosine_epochs)
        check_numbers(least=0, eta_min=eta_min)
        self.constant_epochs = constant_epochs
        self.to_the_end = cosine_epochs is None
        self.cosine_epochs = cosine_epochs
        self.eta_min = eta_min
        super().__init__(optimizer)

    def length_in(self, training: int) -> int:
        return max(1, training - self.constant_epochs)

    def rates(self, epoch: int, length: int) -> list[Any]:
        done = min(max(epoch - self.constant_epochs, 0) / length, 1.0)
        share = (1 + math.cos(math.pi * done)) / 2
        return [self.eta_min + (base - self.eta_min) * share for base in self.base_lrs]


class CosineAnnealing(TiedSchedule, CosineAnnealingLR):
    """torch's ``CosineAnnealingLR``, by default as long as the training.

    Args:
        optimizer: wrapped optimizer.
        T_max: epochs (steps, with ``lr_interval: step``) until ``eta_min``. Default: those of the training, see
            ``TiedSchedule``.
        eta_min: the rate at the end.

    Raises:
        ValueError: for ``T_max`` below 1 or ``eta_min`` below 0.
    """

    def __init__(self, optimizer: Optimizer, T_max: int | None = None, eta_min: float = 0.0) -> None:
        check_numbers(least=1, whole=True, optional=True, T_max=T_max)
        check_numbers(least=0, eta_min=eta_min)
        self.to_the_end = T_max is None
        CosineAnnealingLR.__init__(self, optimizer, T_max, eta_min)  # type: ignore[arg-type]  # None until it is set

    def rates(self, epoch: int, length: int) -> list[Any]:
        share = (1 + math.cos(math.pi * min(epoch / length, 1.0))) / 2
        return [self.eta_min + (base - self.eta_min) * share for base in self.base_lrs]

    def get_lr(self) -> list[Any]:
        if self.last_epoch > 0:
            self.known_length()
        return CosineAnnealingLR.get_lr(self)  # computed from the rate before, so it works in a ChainedScheduler


def schedule_parts(schedule: Any, begin: int = 0, end: int | None = None) -> Iterator[tuple[Any, int, int | None]]:
    """The parts of torch's ``SequentialLR`` and ``ChainedScheduler``; any other schedule is its own only part.

    Args:
        schedule: any scheduler.
        begin: the epoch (or step) with which it begins.
        end: the epoch (or step) before which it ends. Default: the end of the training.

    Returns:
        ``(part, begin, end)`` for each part; ``end`` is ``None`` for the end of the training.
    """
    if isinstance(schedule, SequentialLR):
        marks = [begin, *(begin + milestone for milestone in schedule._milestones)]
        for part, first, last in zip(schedule._schedulers, marks, [*marks[1:], end], strict=True):
            yield from schedule_parts(part, first, last)
    elif isinstance(schedule, ChainedScheduler):
        for part in schedule._schedulers:
            yield from schedule_parts(part, begin, end)
    else:
        yield schedule, begin, end


def set_training_length(schedule: Any, length: int) -> None:
    """Set the length of each part of a schedule that ends with the training of ``length`` epochs (or steps)."""
    for part, begin, end in schedule_parts(schedule):
        if getattr(part, "to_the_end", False):
            part.set_length(max(1, (length if end is None else end) - begin))


def length_warnings(schedule: Any, length: int, training: str, unit: str = "epoch") -> list[str]:
    """A warning for each cosine that does not end with the training: it stops at a high rate, or rises again.

    Args:
        schedule: any scheduler; only parts that are cosines are checked.
        length: epochs (or steps) of the training.
        training: the name of the training or stage, for the warning.
        unit: ``"epoch"`` or ``"step"``.
    """
    found = []
    for part, begin, end in schedule_parts(schedule):
        if end is not None or getattr(part, "to_the_end", False):
            continue
        left, after = length - begin, f" after the first {begin}" if begin else ""
        if isinstance(part, CosineAnnealingLR):
            own, names = part.T_max, "T_max"
        elif isinstance(part, ConstantThenCosine) and part.cosine_epochs is not None:
            own, names = part.constant_epochs + part.cosine_epochs, "constant_epochs + cosine_epochs"
            if own < left:  # then it stays at eta_min
                continue
        elif getattr(part, "length_name", None) == "total_steps":
            own, names = part.total_steps, "total_steps"
            if own < left:  # then it stays at the last rate
                continue
        else:
            continue
        if own != left > 0:
            effect = "ends at a high learning rate" if own > left else "raises the learning rate again"
            other = f", or take lightning_kd.core.schedules.CosineAnnealing, as long as the {training.split()[-1]}"
            found.append(
                f"{type(part).__name__} has {names} {own}, the {training} has {left} {unit}s{after}, so it {effect}: "
                f"set {names} to {left}{other if names == 'T_max' else ''}"
            )
    return found


def rise_warnings(schedule: Any, interval: str) -> list[str]:
    """A warning for each part whose rate rises because a resumed training is longer; ``interval`` names its unit."""
    return [
        f"the training is longer than before, and {type(part).__name__} with it: the learning rate goes from "
        f"{part.raised[0]:.3g} in the last {interval} trained up to {part.raised[1]:.3g}"
        for part, _, _ in schedule_parts(schedule)
        if getattr(part, "raised", None)
    ]
