"""Callbacks that can be added to any method from YAML."""

__all__: list[str] = []
