"""Knowledge distillation: a small student learns from a large teacher."""

from lightning_kd.core.registry import export_modules

__all__ = export_modules(__name__, globals())
