"""Optimizers that evaluate a batch twice a step: what must happen once all the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_kd.core.random_state import set_torch_random_state, torch_random_state

_second = False


def second_pass() -> bool:
    """Whether an optimizer such as ``SAM`` is making its second evaluation of the batch.

    Whatever a ``training_step`` or a hook counts, remembers or reports belongs to the first evaluation alone::

        if not second_pass():
            self.seen += len(batch)
    """
    return _second


class FirstPass:
    """What generators and metrics were before the first evaluation of a batch, so that it can be repeated.

    Made before the first evaluation; the second one runs inside ``repeated()``.

    Args:
        module: what is trained, if it is known. Its buffers (running statistics of normalisation), the ``torchmetrics``
            in it and, for a LightningModule, what it logs are then those of the first evaluation alone. Its NumPy
            generators, attributes or lists of them, are repeated.
        device: of the parameters.
    """

    def __init__(self, module: nn.Module | None, device: torch.device) -> None:
        self.module = module
        self.device = device
        self._modules = [] if module is None else list(module.modules())
        self._metrics = [(m, m.update_count) for m in self._modules if isinstance(m, Metric)]
        self._random = torch_random_state(device)
        self._streams = [] if module is None else _states(module)

    @contextmanager
    def repeated(self) -> Iterator[None]:
        """The second evaluation: the same numbers are drawn, ``second_pass()`` true, nothing counted or logged.

        Afterwards the generators are where the first evaluation left them, also if the second one raised.
        """
        global _second
        after = torch_random_state(self.device)
        streams_after = [(stream, stream.bit_generator.state) for stream, _ in self._streams]
        buffers = [
            (m._buffers, name, value)
            for m in self._modules
            if m.training and m._buffers
            for name, value in m._buffers.items()
            if value is not None
        ]
        kept = _copies([value for *_, value in buffers])
        metrics = [(m, m.update_count, _copied_state(m)) for m, count in self._metrics if m.update_count != count]
        own_log = vars(self.module).get("log") if self.module is not None else None
        before, _second = _second, True
        try:
            if isinstance(self.module, L.LightningModule):
                self.module.log = _log_nothing  # type: ignore[method-assign]
            set_torch_random_state(self._random, self.device)
            _set_states(self._streams)
            yield
        finally:
            _second = before
            set_torch_random_state(after, self.device)
            _set_states(streams_after)
            if isinstance(self.module, L.LightningModule):
                del self.module.log
                if own_log is not None:
                    self.module.log = own_log  # type: ignore[method-assign]
            with torch.no_grad():
                _copy([value for *_, value in buffers], kept)
            for table, name, value in buffers:
                table[name] = value  # a forward may have put another tensor there
            for metric, count, state in metrics:
                for name, value in state.items():
                    setattr(metric, name, value)
                metric._update_count, metric._computed = count, None


def _states(module: nn.Module) -> list[tuple[np.random.Generator, Any]]:
    """The NumPy generators that a module holds, such as those that mix images, and where they are."""
    held = [one for value in vars(module).values() for one in (value if isinstance(value, list) else [value])]
    return [(one, one.bit_generator.state) for one in held if isinstance(one, np.random.Generator)]


def _set_states(states: list[tuple[np.random.Generator, Any]]) -> None:
    for stream, state in states:
        stream.bit_generator.state = state


def _log_nothing(*args: Any, **kwargs: Any) -> None:
    """In the place of ``log`` during the second evaluation."""


def _copied_state(metric: Metric) -> dict[str, Any]:
    return {k: v.clone() if isinstance(v, Tensor) else list(v) for k, v in metric.metric_state.items()}


def _copies(tensors: list[Tensor]) -> list[Tensor]:
    copies = [torch.empty_like(tensor) for tensor in tensors]
    with torch.no_grad():
        _copy(copies, tensors)
    return copies


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Fused for each data type: running statistics come with integer counters."""
    by_kind: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in zip(targets, sources, strict=True):
        mine, theirs = by_kind.setdefault((target.dtype, target.device), ([], []))
        mine.append(target)
        theirs.append(source)
    for mine, theirs in by_kind.values():
        torch._foreach_copy_(mine, theirs)
