"""Global random generators that are afterwards where they were."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

__all__ = ["same_random_state", "set_torch_random_state", "torch_random_state"]


@contextmanager
def same_random_state(device: torch.device, seed: int | None = None) -> Iterator[None]:
    """A pass leaves the global generators as it found them, so that each pass sees the same ones.

    Args:
        device: whose generator counts, beside those of the CPU.
        seed: of all of them inside. Default: they go on from where they are.
    """
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  (what users draw from)
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            if seed is not None:
                random.seed(seed)
                np.random.seed(seed)  # noqa: NPY002
                torch.default_generator.manual_seed(seed)
                if device.type == "cuda":
                    with torch.cuda.device(device):
                        torch.cuda.manual_seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def torch_random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Where torch's generators are: that of the CPU, and that of a CUDA ``device``."""
    # torch's alone: reading that of NumPy takes longer than a step of a small network
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def set_torch_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    """Put them back there."""
    on_host, on_device = state
    torch.set_rng_state(on_host)
    if on_device is not None:
        torch.cuda.set_rng_state(on_device, device)
