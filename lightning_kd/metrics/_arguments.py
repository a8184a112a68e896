"""Which parameters the functions on a network are about, and the random numbers that they draw."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn


def generator(seed: int, stream: str, *numbers: int) -> torch.Generator:
    """A generator on the CPU of the stream ``(seed, stream, *numbers)``, so that all devices see the same numbers."""
    state = np.random.SeedSequence([seed, *stream.encode(), *numbers]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


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
