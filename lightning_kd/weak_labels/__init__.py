"""Labels that are weaker than one right class an image: several candidates, or several annotators."""

from lightning_kd.core.registry import export_modules

__all__ = export_modules(__name__, globals())
