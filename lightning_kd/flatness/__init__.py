"""Flat minima: optimum shifting (smaller weights with the same outputs), sharpness-aware training, gradient noise."""

from lightning_kd.core.registry import export_modules

__all__ = export_modules(__name__, globals())
