"""Metrics that torchmetrics lacks."""

__all__: list[str] = []
