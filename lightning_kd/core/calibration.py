"""Calibration: how well the confidence of predictions matches their accuracy."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_kd.argument_checks import check_numbers


class Reliability(NamedTuple):
    """Confidence and accuracy in bins of equal width of the confidence; NaN in an empty bin.

    Attributes:
        share: float64 ``[bins]``, share of all samples in each bin; sums to 1.
        confidence: float64 ``[bins]``, mean largest probability of its samples.
        accuracy: float64 ``[bins]``, share of its samples that are predicted correctly.
        ece: expected calibration error, the mean of ``|accuracy - confidence|`` over bins, weighted by ``share``.
    """

    share: Tensor
    confidence: Tensor
    accuracy: Tensor
    ece: float

    @classmethod
    def from_sums(cls, sums: Tensor) -> Reliability:
        """From ``reliability_sums`` ``[3, bins]``, added up over any number of batches and processes.

        Raises:
            ValueError: if they have no sample.
        """
        count, confidence, correct = sums.detach().to("cpu", torch.float64)
        if not count.sum() > 0:
            raise ValueError("reliability needs at least one sample, got none: give predictions")
        ece = float((correct - confidence).abs().sum() / count.sum())
        return cls(count / count.sum(), confidence / count, correct / count, ece)


def reliability(probabilities: Tensor, target: Tensor, bins: int = 15) -> Reliability:
    """The reliability diagram of predictions and their expected calibration error.

    A bin holds the samples whose largest probability is in ``(lo, hi]``; torchmetrics'
    ``MulticlassCalibrationError(norm="l1")`` takes ``[lo, hi)``, which differs only for values on a border, such as 1.

    Args:
        probabilities: ``[N, C]``, rows sum to 1.
        target: int64 ``[N]``.
        bins: number of bins, at least 1.

    Raises:
        ValueError: for wrong shapes, no sample, or ``bins`` below 1.

    Source: Guo et al., ICML 2017, arXiv 1706.04599, section 2.
    """
    return Reliability.from_sums(reliability_sums(probabilities, target, bins))


def reliability_sums(probabilities: Tensor, target: Tensor, bins: int = 15) -> Tensor:
    """Sums over the samples in each bin: their number, their confidence, the number of correct predictions.

    Sums of several batches and processes can be added; ``Reliability.from_sums`` turns them into means.

    Args:
        probabilities: ``[N, C]``.
        target: int64 ``[N]``.
        bins: number of bins.

    Returns:
        float64 (float32 on devices without it) ``[3, bins]`` on the device of ``probabilities``.

    Raises:
        ValueError: for wrong shapes, or ``bins`` below 1.
    """
    if probabilities.ndim != 2 or target.shape != probabilities.shape[:1]:
        raise ValueError(
            f"probabilities must be [N, C] and target [N], got {list(probabilities.shape)} and {list(target.shape)}"
        )
    check_numbers(least=1, whole=True, bins=bins)
    confidence, predicted = probabilities.detach().float().max(1)
    borders = torch.linspace(0, 1, bins + 1, dtype=confidence.dtype, device=confidence.device)
    where = (torch.bucketize(confidence, borders) - 1).clamp(0, bins - 1)
    rows = torch.stack([torch.ones_like(confidence), confidence, (predicted == target).float()])
    sums = rows.new_zeros(3, bins, dtype=torch.float32 if rows.device.type == "mps" else torch.float64)
    return sums.index_add_(1, where, rows.to(sums.dtype))


class CalibrationMetric(Metric):
    """Accuracy ``acc`` and expected calibration error ``ece`` (15 bins) over all batches and processes, in [0, 1].

    Attributes:
        reliability: the bins of the last ``compute``.
    """

    full_state_update = False
    correct: Tensor
    sums: Tensor
    reliability: Reliability

    def __init__(self) -> None:
        super().__init__()
        self.add_state("correct", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("sums", torch.zeros(3, 15), dist_reduce_fx="sum")

    def update(self, scores: Tensor, probabilities: Tensor, target: Tensor) -> None:
        """Add a batch.

        Args:
            scores: ``[B, C]``; the largest is the prediction.
            probabilities: ``[B, C]``; the largest is its confidence.
            target: int64 ``[B]``.
        """
        self.correct += (scores.argmax(1) == target).sum()
        self.sums = self.sums + reliability_sums(probabilities, target)

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """torchmetrics' ``sync``, after converting the sums of a process without batches to the others' dtype."""
        if self.sums.device.type != "mps":
            self.sums = self.sums.double()
        super().sync(*args, **kwargs)

    def compute(self) -> dict[str, float]:
        self.reliability = Reliability.from_sums(self.sums)
        return {"acc": float(self.correct / self.sums[0].sum()), "ece": self.reliability.ece}
