"""Knowledge distillation: a small student network learns from a large teacher network."""

from lightning_kd.core.registry import export_modules

__all__ = export_modules(__name__, globals())
