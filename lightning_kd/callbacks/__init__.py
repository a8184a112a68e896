"""Callbacks that can be added to any method from YAML."""

from lightning_kd.callbacks.curve import TestCurve
from lightning_kd.callbacks.figures import label_score_figure, reliability_figure
from lightning_kd.callbacks.pictures import LabelPictures

__all__ = ["LabelPictures", "TestCurve", "label_score_figure", "reliability_figure"]
