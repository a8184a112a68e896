"""Plain cross-entropy on the given labels: what a method for noisy labels must beat."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lightning_kd.core.batch import Batch
from lightning_kd.noisy_labels.noisy_label_task import SingleNetworkTask

__all__ = ["CrossEntropy"]


class CrossEntropy(SingleNetworkTask):
    """The baseline: cross-entropy that believes every label, with the loaders, logs and verdict of the other methods.

    Several processes: nothing but gradients is shared.

    Args:
        network: see ``SingleNetworkTask``.
        num_classes: see ``Task``.
        input_shape: see ``Task``.
        kwargs: ``weights`` of ``SingleNetworkTask``, and the arguments of ``FineTunedTask`` and ``Task``.
    """

    def noisy_loss(self, logits: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(logits, batch.target)
