"""Open-set active learning: choosing which images to label from a pool that also holds images of unwanted classes."""

from lightning_kd.core.registry import export_modules

__all__ = export_modules(__name__, globals())
