"""Plain cross-entropy on the given labels: the baseline for methods for noisy labels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lightning_kd.core.batch import Batch
from lightning_kd.noisy_labels.noisy_label_task import SingleNetworkTask

__all__ = ["CrossEntropy"]


class CrossEntropy(SingleNetworkTask):
    """Baseline for noisy labels: plain cross-entropy on the given labels.

    It trusts every label. Loaders, metrics and the report of label scores are those of the other methods, so that
    results can be compared.

    Several processes: only gradients are shared.

    Args:
        network: see ``SingleNetworkTask``.
        num_classes: see ``Task``.
        input_shape: see ``Task``.
        kwargs: ``weights`` of ``SingleNetworkTask``, and the arguments of ``FineTunedTask`` and ``Task``.
    """

    def noisy_loss(self, logits: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(logits, batch.target)
