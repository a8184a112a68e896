"""What a computation must not change around it, and what must not change it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor


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


@contextmanager
def no_tf32() -> Iterator[None]:
    """Float32 means float32, on GPUs too."""
    matmul, cudnn = torch.backends.cuda.matmul, cast(Any, torch.backends.cudnn)
    if hasattr(matmul, "fp32_precision"):  # the older switches may not be read once the newer are used
        places, name, off = [matmul, cudnn.conv, cudnn.rnn], "fp32_precision", "ieee"
    else:
        places, name, off = [matmul, cudnn], "allow_tf32", False  # type: ignore[assignment]
    before = [getattr(place, name) for place in places]
    try:
        for place in places:
            setattr(place, name, off)
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            setattr(place, name, value)


@contextmanager
def saved_bytes(ignored: set[int]) -> Iterator[list[int]]:
    """Counts the bytes that graphs made inside hold on to."""
    count, seen = [0], set(ignored)

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            count[0] += storage.nbytes()
        return tensor.detach()  # an output itself would hold the graph that holds it, for ever

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield count
