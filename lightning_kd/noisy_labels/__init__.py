"""Learning with noisy labels: training although some labels are wrong, and finding the wrong ones."""

from lightning_kd.core.registry import export_modules

__all__ = export_modules(__name__, globals())
