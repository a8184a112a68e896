"""Stopping a training whose loss is NaN or infinite."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor


class FiniteGuard:
    """Checks the loss terms of each step and raises if they are not finite, without making a GPU wait.

    On a CPU ``record`` checks at once. On a CUDA device it starts an asynchronous copy to the host, and checks earlier
    steps whose copies have arrived.
    """

    def __init__(self) -> None:
        self._pending: deque[tuple[Any, ...]] = deque()

    def __deepcopy__(self, memo: dict[int, Any]) -> FiniteGuard:
        return FiniteGuard()  # CUDA events cannot be copied, and a copied task starts with no steps

    def record(self, names: tuple[str, ...], values: Tensor, logits: Tensor, step: int, epoch: int) -> None:
        """Add the loss terms of one step, their sum first, and check what has arrived.

        Args:
            names: names of the terms.
            values: ``[len(names)]``, the terms.
            logits: logits of the step, for the message.
            step: number of the optimizer step.
            epoch: number of the epoch.

        Raises:
            RuntimeError: if the sum is not finite, naming step, epoch, terms and the largest absolute logit.
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
        """Raise for the first recorded step that was not finite; with ``wait``, wait for copies not yet arrived."""
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
