"""What BUAL knows in its negative stage: the subset of the pool, the wrong classes, and snapshots of predictions."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor

from lightning_kd.active_learning.bual_score import complementary_labels
from lightning_kd.core.sample_memory import SampleMemory


class NegativeStage:
    """Of one round.

    Args:
        num_classes: number of known classes ``K``.
        auxiliary_trained: whether there are samples for the auxiliary network.

    Attributes:
        start: first epoch of the stage, once it is reached.
        subset: int64, the samples of the pool in it.
        snapshots: how many were taken.
        sum: of the probabilities in all snapshots.
    """

    def __init__(self, num_classes: int, auxiliary_trained: bool) -> None:
        self.num_classes = num_classes
        self.auxiliary_trained = auxiliary_trained
        self.start: int | None = None
        self.subset = np.empty(0, dtype=np.int64)
        self.snapshots = 0
        self.sum = SampleMemory((num_classes,))
        self._labels: tuple[int, Tensor] | None = None  # of which epoch, and by index

    def labels(
        self, epoch: int, target: Tensor, known: np.ndarray, stream: np.random.Generator, device: torch.device
    ) -> Tensor:
        """Complementary labels int64 ``[N]`` of ``epoch``, drawn where first asked for: a fit may go on in the midst
        of one.

        Args:
            epoch: number of it.
            target: int64 ``[N]``, the labels of all training samples.
            known: the labelled samples of known classes.
            stream: of the epoch.
            device: of the result.
        """
        if self._labels is None or self._labels[0] != epoch:
            # for all samples at once and looked up by index: no matter how they are batched and shared out
            chosen = torch.from_numpy(np.union1d(known, self.subset))
            labels = torch.zeros(len(target), dtype=torch.int64)
            labels[chosen] = complementary_labels(target[chosen].cpu(), self.num_classes, stream)
            self._labels = epoch, labels.to(device)
        return self._labels[1]

    def add_snapshot(self, index: Tensor, probabilities: Tensor, count: int) -> None:
        """Add predictions ``[n, K]`` for the samples ``index`` int64 ``[n]``, of ``count`` in all."""
        self.sum.allocate(count, torch.device("cpu"))
        self.sum.rows[index] += probabilities.to(self.sum.dtype)
        self.snapshots += 1

    def mean(self, index: Tensor, device: torch.device) -> Tensor:
        """The mean prediction ``[B, K]`` over snapshots for ``index`` int64 ``[B]``; -1 for a sample in none."""
        self.sum.rows = rows = self.sum.rows.to(device)  # moved once
        negative = rows[index.clamp(max=len(rows) - 1)] / self.snapshots
        there = (index < len(rows)) & (negative.sum(1) != 0)
        return negative.masked_fill(~there[:, None], -1)

    def state_dict(self) -> dict[str, Any]:
        """For checkpoints."""
        return {
            "auxiliary_trained": self.auxiliary_trained,
            "start": self.start,
            "subset": torch.from_numpy(self.subset),
            "snapshots": self.snapshots,
            "sum": self.sum.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what a checkpoint holds."""
        self.auxiliary_trained, self.start = state["auxiliary_trained"], state["start"]
        self.subset, self.snapshots = state["subset"].numpy(), state["snapshots"]
        self.sum.load_state_dict(state["sum"])


def check_fit(trainer: Any, negative_epochs: int) -> None:
    """Raise a ``ValueError`` where a fit has no room for both stages, or may end before the second one."""
    if any(isinstance(callback, EarlyStopping) for callback in trainer.callbacks):
        raise ValueError(
            "BUAL must train through all its epochs, got EarlyStopping, to which the negative stage looks like no "
            "progress: take it out of trainer.callbacks"
        )
    epochs = trainer.max_epochs
    if not trainer.fast_dev_run and (epochs is None or epochs <= negative_epochs):
        raise ValueError(
            f"max_epochs must be above negative_epochs={negative_epochs}, got {epochs}: raise "
            "trainer.max_epochs, or lower model.negative_epochs; what is left are the epochs of the positive stage"
        )


def check_choices(uncertainty: str, combine: str, subset: str) -> None:
    """Raise a ``ValueError`` for an argument of ``BUAL`` that is none of its choices."""
    if uncertainty not in ("least_confidence", "margin", "entropy"):
        raise ValueError(f"uncertainty must be 'least_confidence', 'margin' or 'entropy', got {uncertainty!r}")
    if combine not in ("code", "paper"):
        raise ValueError(f"combine must be 'code' or 'paper', got {combine!r}")
    if subset not in ("candidates", "pool"):
        raise ValueError(f"subset must be 'candidates' or 'pool', got {subset!r}")
