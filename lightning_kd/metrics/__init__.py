"""Metrics that torchmetrics lacks."""

from lightning_kd.core.calibration import Reliability, reliability
from lightning_kd.metrics.classifier_head import feature_hessian_trace, neural_collapse, relative_flatness
from lightning_kd.metrics.curvature import hessian_eigenvalues, hessian_vector_product, power_iteration
from lightning_kd.metrics.landscape import (
    LossSlice,
    filter_normalize,
    filter_normalized_direction,
    interpolation,
    loss_slice,
)
from lightning_kd.metrics.noise_detection import memorisation, selection_metrics
from lightning_kd.metrics.sharpness import Sharpness, epsilon_sharpness, measure_sharpness
from lightning_kd.metrics.traces import gauss_newton_trace, hessian_trace, layer_relative_flatness

__all__ = [
    "LossSlice",
    "Reliability",
    "Sharpness",
    "epsilon_sharpness",
    "feature_hessian_trace",
    "filter_normalize",
    "filter_normalized_direction",
    "gauss_newton_trace",
    "hessian_eigenvalues",
    "hessian_trace",
    "hessian_vector_product",
    "interpolation",
    "layer_relative_flatness",
    "loss_slice",
    "measure_sharpness",
    "memorisation",
    "neural_collapse",
    "power_iteration",
    "relative_flatness",
    "reliability",
    "selection_metrics",
]
