"""A pass of a task over samples during a fit, whose results are in the order of the samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import lightning as L
import torch
from torch import Tensor

from lightning_kd.core.batch import Batch
from lightning_kd.core.distributed import gather_columns, share_buffers
from lightning_kd.core.module_modes import eval_mode


@contextmanager
def evaluating(task: L.LightningModule) -> Iterator[None]:
    """A context in eval mode, without gradient, in the precision of the run; it restores the mode of every module."""
    with eval_mode(task), torch.no_grad(), task.trainer.precision_plugin.val_step_context():
        yield


def ordered_pass(
    task: L.LightningModule, loader: Iterable[Batch], measure: Callable[[Batch], Sequence[Tensor]]
) -> tuple[Tensor, ...]:
    """Call ``measure`` on every batch of ``loader``, in eval mode; all processes must call it.

    First all processes get the buffers (running statistics) of process 0, so that they use the same network.

    Args:
        task: a task with a Trainer, on its device.
        loader: yields batches of this process's share, with ``index``.
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
    columns = {str(k): torch.cat(column) for k, column in enumerate(zip(*parts, strict=True))}
    index = columns.pop("0", torch.empty(0, dtype=torch.int64))  # no sample in this process
    return tuple(gather_columns({"index": index, **columns}).values())
