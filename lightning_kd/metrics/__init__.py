"""Metrics that torchmetrics lacks."""

from lightning_kd.metrics.calibration import Reliability, reliability
from lightning_kd.metrics.label_noise import memorisation, selection_metrics

__all__ = ["Reliability", "memorisation", "reliability", "selection_metrics"]
