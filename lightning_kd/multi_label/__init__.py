"""Several labels an image."""

from lightning_kd.core.registry import export_modules

__all__ = export_modules(__name__, globals())
