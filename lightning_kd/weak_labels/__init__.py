"""Weak labels: several candidate labels for each image, or labels from several annotators."""

from lightning_kd.core.registry import export_modules

__all__ = export_modules(__name__, globals())
