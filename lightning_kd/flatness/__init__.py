"""Flat minima: shifting weights to smaller ones that answer alike, and sharpness-aware training."""

from lightning_kd.core.registry import export_modules

__all__ = export_modules(__name__, globals())
