"""Stopping a training whose loss is no number any more."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor


class FiniteGuard:
    """Notes each step's loss terms and raises once they are not finite, without making a GPU wait.

    On a CPU ``record`` checks at once. On a CUDA device the values are copied to the host behind the running work, and
    each ``record`` checks the earlier steps whose copies have arrived.
    """

    def __init__(self) -> None:
        self._pending: deque[tuple[Any, ...]] = deque()

    def __deepcopy__(self, memo: dict[int, Any]) -> FiniteGuard:
        return FiniteGuard()  # events cannot be copied, and a copied task has steps of its own

    def record(self, names: tuple[str, ...], values: Tensor, logits: Tensor, step: int, epoch: int) -> None:
        """Take the terms of one step, the sum of them first.

        Args:
            names: of the terms.
            values: ``[len(names)]``.
            logits: of the step; their largest size is told when it breaks.
            step: number of the optimizer step.
            epoch: number of the epoch.

        Raises:
            RuntimeError: naming step, epoch, terms and the largest logit.
        """
        event = None
        on_host = values
        if values.device.type == "cuda":
            on_host = values.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._pending.append((on_host, event, names, logits, step, epoch))
        self.check()

    def check(self, wait: bool = False) -> None:
        """Raise for the first noted step that was not finite; ``wait`` for those still on their way."""
        while self._pending:
            values, event, names, logits, step, epoch = self._pending[0]
            if event is not None and not event.query():
                if not wait:
                    return
                event.synchronize()
            self._pending.popleft()
            numbers = values.tolist()
            if abs(numbers[0]) < float("inf"):
                continue
            self._pending.clear()
            terms = ", ".join(f"{name} {value:.4g}" for name, value in zip(names, numbers, strict=True))
            raise RuntimeError(
                f"the loss is not finite at step {step} (epoch {epoch}): {terms}, largest |logit| "
                f"{float(logits.abs().max()):.4g}; check the inputs and start anew with a lower learning rate, or clip "
                "gradients and go on from last.ckpt (which keeps its learning rate)"
            )
