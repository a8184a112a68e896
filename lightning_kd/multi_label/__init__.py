"""Multi-label classification: each image may have several labels."""

from lightning_kd.core.registry import export_modules

__all__ = export_modules(__name__, globals())
