"""The state of BUAL's negative stage: the subset of the pool, the complementary labels, snapshots of predictions."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor

from lightning_kd.active_learning.bual_score import complementary_labels
from lightning_kd.core.sample_memory import SampleMemory


class NegativeStage:
    """The negative stage of one round.

    Args:
        num_classes: number of known classes ``K``.
        auxiliary_trained: whether the auxiliary network is trained, that is, whether there are answers "unknown".

    Attributes:
        start: first epoch of the stage; ``None`` before it is reached.
        subset: int64 ``[s]``, positions of the pool samples that the stage trains on.
        snapshots: number of snapshots taken so far.
        sum: the sum of the probabilities over the snapshots, a row ``[K]`` for each sample.
    """

    def __init__(self, num_classes: int, auxiliary_trained: bool) -> None:
        self.num_classes = num_classes
        self.auxiliary_trained = auxiliary_trained
        self.start: int | None = None
        self.subset = np.empty(0, dtype=np.int64)
        self.snapshots = 0
        self.sum = SampleMemory((num_classes,))
        self._labels: tuple[int, Tensor] | None = None  # (epoch, labels by index)

    def labels(
        self, epoch: int, target: Tensor, known: np.ndarray, stream: np.random.Generator, device: torch.device
    ) -> Tensor:
        """The complementary labels of ``epoch``, int64 ``[N]``.

        They are drawn at the first call of an epoch, not at its start, because a resumed fit may start within an epoch.

        Args:
            epoch: number of the epoch.
            target: int64 ``[N]``, the labels of all training samples.
            known: int64, positions of the labelled samples of known classes.
            stream: random generator of this epoch.
            device: device of the result.
        """
        if self._labels is None or self._labels[0] != epoch:
            # drawn for all samples at once, so that batch size and number of processes make no difference
            chosen = torch.from_numpy(np.union1d(known, self.subset))
            labels = torch.zeros(len(target), dtype=torch.int64)
            labels[chosen] = complementary_labels(target[chosen].cpu(), self.num_classes, stream)
            self._labels = epoch, labels.to(device)
        return self._labels[1]

    def add_snapshot(self, index: Tensor, probabilities: Tensor, count: int) -> None:
        """Add one snapshot: probabilities ``[n, K]`` of the samples ``index`` int64 ``[n]``; ``count`` is the number of
        all training samples."""
        self.sum.allocate(count, torch.device("cpu"))
        self.sum.rows[index] += probabilities.to(self.sum.dtype)
        self.snapshots += 1

    def mean(self, index: Tensor, device: torch.device) -> Tensor:
        """The probabilities ``[B, K]`` of the samples ``index`` int64 ``[B]``, averaged over the snapshots; -1 for a
        sample that is in no snapshot."""
        self.sum.rows = rows = self.sum.rows.to(device)  # kept there for the next batch
        negative = rows[index.clamp(max=len(rows) - 1)] / self.snapshots
        there = (index < len(rows)) & (negative.sum(1) != 0)
        return negative.masked_fill(~there[:, None], -1)

    def state_dict(self) -> dict[str, Any]:
        """The state as a checkpoint stores it."""
        return {
            "auxiliary_trained": self.auxiliary_trained,
            "start": self.start,
            "subset": torch.from_numpy(self.subset),
            "snapshots": self.snapshots,
            "sum": self.sum.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state from a checkpoint."""
        self.auxiliary_trained, self.start = state["auxiliary_trained"], state["start"]
        self.subset, self.snapshots = state["subset"].numpy(), state["snapshots"]
        self.sum.load_state_dict(state["sum"])


def check_fit(trainer: Any, negative_epochs: int) -> None:
    """Raise a ``ValueError`` if a fit has too few epochs for both stages, or may stop before the negative stage."""
    if any(isinstance(callback, EarlyStopping) for callback in trainer.callbacks):
        raise ValueError(
            "BUAL must train for all its epochs, got EarlyStopping, which would stop in the negative stage, where the "
            "reported network does not change: take it out of trainer.callbacks"
        )
    epochs = trainer.max_epochs
    if not trainer.fast_dev_run and (epochs is None or epochs <= negative_epochs):
        raise ValueError(
            f"max_epochs must be above negative_epochs={negative_epochs}, got {epochs}: raise "
            "trainer.max_epochs, or lower model.negative_epochs; the difference is the length of the positive stage"
        )


def check_choices(uncertainty: str, combine: str, subset: str) -> None:
    """Raise a ``ValueError`` that names the argument of ``BUAL`` whose value is not among its choices."""
    if uncertainty not in ("least_confidence", "margin", "entropy"):
        raise ValueError(f"uncertainty must be 'least_confidence', 'margin' or 'entropy', got {uncertainty!r}")
    if combine not in ("code", "paper"):
        raise ValueError(f"combine must be 'code' or 'paper', got {combine!r}")
    if subset not in ("candidates", "pool"):
        raise ValueError(f"subset must be 'candidates' or 'pool', got {subset!r}")
