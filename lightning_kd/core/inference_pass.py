"""One ordered pass of a task over samples in the midst of a fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import lightning as L
import torch
from torch import Tensor

from lightning_kd.core.batch import Batch
from lightning_kd.core.distributed import gather_by_index, share_buffers
from lightning_kd.core.module_modes import eval_mode


@contextmanager
def evaluating(task: L.LightningModule) -> Iterator[None]:
    """Eval mode without gradient, in the run's precision; afterwards every module is in its mode again."""
    with eval_mode(task), torch.no_grad(), task.trainer.precision_plugin.val_step_context():
        yield


def ordered_pass(
    task: L.LightningModule, loader: Iterable[Batch], measure: Callable[[Batch], Sequence[Tensor]]
) -> tuple[Tensor, ...]:
    """``measure`` on every batch of ``loader``, in eval mode; collective.

    The running statistics of process 0 are given to all processes first, so that all see one network.

    Args:
        task: under a Trainer, on its device.
        loader: yields this process's ``Batch`` es, with ``index``.
        measure: from a batch on the device to tensors ``[B, ...]``.

    Returns:
        ``(index, *measured)`` of all processes, sorted by index, each index once, on the CPU.
    """
    parts: list[tuple[Tensor, ...]] = []
    share_buffers(task)
    with evaluating(task):
        for batch in loader:
            batch = task.trainer.precision_plugin.convert_input(task.trainer.strategy.batch_to_device(batch))
            assert batch.index is not None
            parts.append((batch.index, *measure(batch)))
    return gather_by_index(*(torch.cat(column) for column in zip(*parts, strict=True)))
