"""Callbacks that can be added to any method from YAML."""

from lightning_kd.callbacks.accuracy_curve import TestCurve
from lightning_kd.callbacks.label_figures import label_score_figure, reliability_figure
from lightning_kd.callbacks.label_pictures import LabelPictures
from lightning_kd.callbacks.segmentation_pictures import SegmentationPictures
from lightning_kd.callbacks.sharpness_report import SharpnessReport
from lightning_kd.callbacks.slice_figure import slice_figure

__all__ = [
    "LabelPictures",
    "SegmentationPictures",
    "SharpnessReport",
    "TestCurve",
    "label_score_figure",
    "reliability_figure",
    "slice_figure",
]
