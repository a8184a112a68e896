"""Using a trained run: predictions from Python, and network files for other programs."""

from lightning_kd.deploy.predictor import Predictions, Predictor, load

__all__ = ["Predictions", "Predictor", "load"]
