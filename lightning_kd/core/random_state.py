"""Saving and restoring the state of the global random generators."""

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
    """A context that restores the global generators of torch, NumPy and Python at its end.

    Args:
        device: the device whose generator is restored, besides those of the CPU.
        seed: seed of all generators inside. Default: they continue from their present state.
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
    """The states of torch's generators: that of the CPU, and that of ``device`` if it is a CUDA device, else None."""
    # not NumPy's: reading its state takes longer than a step of a small network
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def set_torch_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    """Restore the states that ``torch_random_state`` returned."""
    on_host, on_device = state
    torch.set_rng_state(on_host)
    if on_device is not None:
        torch.cuda.set_rng_state(on_device, device)
