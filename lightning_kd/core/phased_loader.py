"""A loader whose epoch has several phases, each of which trains one network on its own batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, repeat
from typing import Any, NamedTuple

from lightning_kd.core.batch import Batch


class PhaseBatch(NamedTuple):
    """The batches of one step of a phase.

    Attributes:
        network: number of the network that is trained.
        labelled: the batch whose targets are used.
        unlabelled: the batch whose targets are not used; ``None`` in a phase without unlabelled batches.
        progress: share of the phase's steps before this one, in [0, 1).
    """

    network: int
    labelled: Batch
    unlabelled: Batch | None = None
    progress: float = 0.0


class Phase(NamedTuple):
    """The part of an epoch in which one network is trained.

    Attributes:
        network: number of the network.
        labelled: loader of labelled batches; the phase is one pass over it.
        unlabelled: loader of unlabelled batches, repeated as often as needed; ``None`` for none.
        by_unlabelled: make the phase one pass over ``unlabelled`` instead, and repeat ``labelled``.
    """

    network: int
    labelled: Any
    unlabelled: Any = None
    by_unlabelled: bool = False

    @property
    def leading(self) -> Any:
        """The loader that the phase is one pass over."""
        return self.unlabelled if self.by_unlabelled else self.labelled


class PhasedLoader:
    """The phases of one epoch, one after the other, as one loader of ``PhaseBatch``.

    Lightning finds ``set_epoch`` through ``sampler``; the loaders inside divide the samples over processes themselves.

    Args:
        phases: at least one; their loaders have a length and ``set_epoch``.
        alternate: take one step of each phase in turn until the shortest ends, so that the first few steps train all
            networks.
    """

    def __init__(self, phases: Sequence[Phase], alternate: bool = False) -> None:
        self.phases = list(phases)
        self.alternate = alternate

    @property
    def sampler(self) -> PhasedLoader:
        return self

    @property
    def batch_sampler(self) -> PhasedLoader:
        return self

    def set_epoch(self, epoch: int) -> None:
        for phase in self.phases:
            for loader in (phase.labelled, phase.unlabelled):
                if loader is not None:
                    loader.set_epoch(epoch)

    def __len__(self) -> int:
        return sum(len(phase.leading) for phase in self.phases)

    def __iter__(self) -> Iterator[PhaseBatch]:
        steps = [_steps(phase) for phase in self.phases]
        if self.alternate:
            for _ in range(min(len(phase.leading) for phase in self.phases)):
                yield from map(next, steps)
        yield from chain(*steps)


def _steps(phase: Phase) -> Iterator[PhaseBatch]:
    following = phase.labelled if phase.by_unlabelled else phase.unlabelled
    others: Iterator[Any] = repeat(None)
    if following is not None:
        others = chain.from_iterable(repeat(following))  # each turn is a new pass with a new order
    for step, (batch, other) in enumerate(zip(phase.leading, others, strict=False)):
        labelled, unlabelled = (other, batch) if phase.by_unlabelled else (batch, other)
        yield PhaseBatch(phase.network, labelled, unlabelled, step / len(phase.leading))
