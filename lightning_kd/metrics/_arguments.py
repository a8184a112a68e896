"""Choose the parameters of a network by name, and seed random generators, for the metrics in this folder."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn


def generator(seed: int, stream: str, *numbers: int) -> torch.Generator:
    """A generator seeded by ``(seed, stream, *numbers)``; on the CPU, so that all devices get the same numbers."""
    state = np.random.SeedSequence([seed, *stream.encode(), *numbers]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def chosen_parameters(model: nn.Module, parameters: Sequence[str] | None) -> dict[str, nn.Parameter]:
    """Parameters by name, in the model's order.

    Args:
        model: a network.
        parameters: names of parameters, or of modules for all of theirs. Default: all trainable parameters.

    Raises:
        TypeError: where ``parameters`` is a single string.
        ValueError: for an unknown name, an empty list, or a model without trainable parameters.
    """
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
        raise ValueError(
            f"parameters must name parameters or modules of {type(model).__name__}, got {unknown or 'an empty list'}: "
            f"choose from {list(known)[:12]} or their modules"
        )
    return {k: p for k, p in known.items() if any(k == name or k.startswith(f"{name}.") for name in parameters)}
