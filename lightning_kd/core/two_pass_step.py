"""Support for optimizers that evaluate a batch twice in a step, such as SAM: side effects must happen once."""

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
    """Whether an optimizer such as ``SAM`` is in its second evaluation of the batch.

    A ``training_step`` or a hook should count, store or log things in the first evaluation only::

        if not second_pass():
            self.seen += len(batch)
    """
    return _second


class FirstPass:
    """The state of generators and metrics before the first evaluation of a batch, so that it can be repeated.

    Make it before the first evaluation; run the second one inside ``repeated()``.

    Args:
        module: the trained module, if it is known. Its buffers (running statistics of normalisation), the
            ``torchmetrics`` in it and, for a LightningModule, its logged values are then those of the first evaluation
            alone. Its NumPy generators (attributes, or in lists) draw the same numbers again.
        device: device of the parameters.
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
        """A context for the second evaluation.

        Inside, the same random numbers are drawn, ``second_pass()`` is True, and metrics, buffers and logs are not
        changed. Afterwards the generators have the state after the first evaluation, even if the second one raised.
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
                table[name] = value  # a forward may have replaced the tensor
            for metric, count, state in metrics:
                for name, value in state.items():
                    setattr(metric, name, value)
                metric._update_count, metric._computed = count, None


def _states(module: nn.Module) -> list[tuple[np.random.Generator, Any]]:
    """The NumPy generators among a module's attributes, such as those that mix images, and their states."""
    held = [one for value in vars(module).values() for one in (value if isinstance(value, list) else [value])]
    return [(one, one.bit_generator.state) for one in held if isinstance(one, np.random.Generator)]


def _set_states(states: list[tuple[np.random.Generator, Any]]) -> None:
    for stream, state in states:
        stream.bit_generator.state = state


def _log_nothing(*args: Any, **kwargs: Any) -> None:
    """Replaces ``log`` during the second evaluation."""


def _copied_state(metric: Metric) -> dict[str, Any]:
    return {k: v.clone() if isinstance(v, Tensor) else list(v) for k, v in metric.metric_state.items()}


def _copies(tensors: list[Tensor]) -> list[Tensor]:
    copies = [torch.empty_like(tensor) for tensor in tensors]
    with torch.no_grad():
        _copy(copies, tensors)
    return copies


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy in one fused call for each dtype and device: running statistics are beside integer counters."""
    by_kind: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in zip(targets, sources, strict=True):
        mine, theirs = by_kind.setdefault((target.dtype, target.device), ([], []))
        mine.append(target)
        theirs.append(source)
    for mine, theirs in by_kind.values():
        torch._foreach_copy_(mine, theirs)
