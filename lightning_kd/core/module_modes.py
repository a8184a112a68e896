"""Training and eval modes that are afterwards what they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["eval_mode"]


@contextmanager
def eval_mode(network: nn.Module) -> Iterator[None]:
    """``network`` in eval mode; afterwards every module in it is in its own mode again."""
    training = [module for module in network.modules() if module.training]
    try:
        network.eval()
        yield
    finally:
        for module in training:
            module.training = True
