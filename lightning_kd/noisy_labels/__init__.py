"""Learning with noisy labels: training on labels of which some are wrong, and finding those."""

from lightning_kd.core.registry import export_modules

__all__ = export_modules(__name__, globals())
