"""Plain arithmetic in the place of faster kinds: full precision on GPUs, and attention by its operations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["no_tf32", "plain_attention"]


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
def plain_attention() -> Iterator[None]:
    """Attention by matrix products and a softmax, also in eval mode, for what its fused kernels cannot do."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
