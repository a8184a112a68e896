"""Open-set active learning: choosing what to label from a pool full of things nobody asked for."""

from lightning_kd.core.registry import export_modules

__all__ = export_modules(__name__, globals())
