"""A trained run put to use: predictions from Python, and files that other programs run."""

from lightning_kd.deploy.predictor import Predictions, Predictor, load

__all__ = ["Predictions", "Predictor", "load"]
