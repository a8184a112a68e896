"""Contexts that turn off faster kinds of arithmetic: TF32 on GPUs, and fused attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["no_tf32", "plain_attention"]


@contextmanager
def no_tf32() -> Iterator[None]:
    """A context in which GPUs compute float32 in full precision, without TF32."""
    matmul, cudnn = torch.backends.cuda.matmul, cast(Any, torch.backends.cudnn)
    if hasattr(matmul, "fp32_precision"):  # torch raises if both kinds of switches are used
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
    """A context in which attention is computed by matrix products and softmax, not by fused kernels, also in eval mode.

    Fused kernels lack some derivatives.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
