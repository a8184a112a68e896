"""Callbacks that can be added to any method from YAML."""

from lightning_kd.callbacks.curve import TestCurve
from lightning_kd.callbacks.figures import label_score_figure, reliability_figure
from lightning_kd.callbacks.pictures import LabelPictures
from lightning_kd.callbacks.sharpness import SharpnessReport
from lightning_kd.callbacks.slices import slice_figure

__all__ = ["LabelPictures", "SharpnessReport", "TestCurve", "label_score_figure", "reliability_figure", "slice_figure"]
