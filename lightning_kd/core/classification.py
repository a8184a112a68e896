"""Plain supervised training: of a teacher, or of the baseline that a method must beat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_kd.core.batch import as_batch
from lightning_kd.core.losses import at_least_float32
from lightning_kd.core.task import Task
from lightning_kd.core.weights import load_weights

__all__ = ["Classification"]


class Classification(Task):
    """Train one network with cross-entropy.

    After ``fit`` the run folder holds ``network.pt``, a plain ``state_dict``; a distillation task takes it (or the
    checkpoint) as ``teacher_weights``.

    Args:
        network: a network's name (``lightning-kd list``) or any ``nn.Module`` that gives logits ``[B, C]``.
        num_classes: see ``Task``.
        input_shape: see ``Task``.
        weights: checkpoint or ``state_dict`` file to start from. Default: train from scratch.
        label_smoothing: of the cross-entropy, in [0, 1).
        kwargs: ``optimizer``, ``lr_scheduler``, ``lr_interval``, ``channels_last``, ``compile`` of ``Task``.
    """

    def __init__(
        self,
        network: str | nn.Module,
        num_classes: int,
        *,
        input_shape: Sequence[int] = (3, 32, 32),
        weights: str | None = None,
        label_smoothing: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_classes, input_shape=input_shape, **kwargs)
        self.network = self.build(network)
        if weights is not None:
            load_weights(self.network, weights, num_classes)
        self.label_smoothing = label_smoothing

    @property
    def main_network(self) -> nn.Module:
        return self.network

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch = as_batch(batch)
        (logits,) = at_least_float32(self(batch.image))
        loss = F.cross_entropy(logits, batch.target, label_smoothing=self.label_smoothing)
        return self.step_loss({"ce": loss}, logits, batch.target)
