"""Metrics of semantic segmentation, from one confusion matrix of the pixels."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

__all__ = ["SegmentationMetric"]


class SegmentationMetric(Metric):
    """``miou`` and ``pixel_acc`` over all pixels that are not ignored, of all batches and processes.

    ``miou`` is the mean intersection over union of the classes that occur in the targets or in the predictions;
    ``pixel_acc`` is the share of pixels predicted correctly. Both are in [0, 1].

    Args:
        num_classes: ``C``.

    Attributes:
        counts: int64 ``[C, C]``, pixels by class and predicted class.
    """

    full_state_update = False
    counts: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.add_state("counts", torch.zeros(num_classes, num_classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add a batch: both int64 ``[B, H, W]``; pixels with the target -1 are ignored."""
        # ignored pixels go to one more cell after the matrix
        cell = torch.where(target >= 0, target * self.num_classes + prediction, self.num_classes**2)
        counted = torch.bincount(cell.flatten(), minlength=self.num_classes**2 + 1)[:-1]
        self.counts = self.counts + counted.view_as(self.counts)

    def compute(self) -> dict[str, float]:
        counts = self.counts.cpu().double()  # MPS has no float64
        right = counts.diagonal()
        union = counts.sum(0) + counts.sum(1) - right
        occurs = union > 0
        miou = float((right[occurs] / union[occurs]).mean()) if occurs.any() else 0.0
        return {"miou": miou, "pixel_acc": float(right.sum() / counts.sum().clamp(min=1))}
