"""What the functions on a network, a loss and data are given, and the random numbers that they draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def generator(seed: int, stream: str, *numbers: int) -> torch.Generator:
    """A generator on the CPU of the stream ``(seed, stream, *numbers)``, so that all devices see the same numbers."""
    state = np.random.SeedSequence([seed, *stream.encode(), *numbers]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def batch_size(batch: Any) -> int:
    """How many samples a batch holds: the length of its targets ``batch[1]``, or of its first tensor."""
    if isinstance(batch, Sequence) and len(batch) > 1 and isinstance(batch[1], Tensor):
        return len(batch[1])
    values = batch.values() if isinstance(batch, Mapping) else batch
    first = batch if isinstance(batch, Tensor) else next((v for v in values if isinstance(v, Tensor)), None)
    if first is None:
        raise TypeError(f"a batch must hold a tensor, got {type(batch).__name__}: let the loader give (image, target)")
    return len(first)


def chosen_parameters(model: nn.Module, parameters: Sequence[str] | None) -> dict[str, nn.Parameter]:
    """The parameters of these names or of modules of these names; all trainable ones by default."""
    known = dict(model.named_parameters())
    if parameters is None:
        chosen = {name: p for name, p in known.items() if p.requires_grad}
        if not chosen:
            raise ValueError(f"{type(model).__name__} has no trainable parameter: name some by parameters=[...]")
        return chosen
    if isinstance(parameters, str):
        raise TypeError(f"parameters must be a list of names, got {parameters!r}: write [{parameters!r}]")
    unknown = [name for name in parameters if not any(k == name or k.startswith(f"{name}.") for k in known)]
    if unknown or not parameters:
        raise ValueError(f"parameters names {unknown or 'nothing'}: choose from {list(known)[:12]} or their modules")
    return {k: p for k, p in known.items() if any(k == name or k.startswith(f"{name}.") for name in parameters)}


def is_batch(loader: Any) -> bool:
    """Whether this is one batch, not several."""
    if isinstance(loader, Mapping | Tensor) or hasattr(loader, "_fields"):
        return True
    return isinstance(loader, list | tuple) and bool(loader) and isinstance(loader[0], Tensor)
