"""Evaluating a task on a loader during a fit."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torchmetrics import MetricCollection

from lightning_kd.core.batch import as_batch
from lightning_kd.core.evaluation import loss_metric
from lightning_kd.core.inference_pass import evaluating


def evaluate(trainer: L.Trainer, task: Any, loader: Any, limit: int | float = 1.0) -> MetricCollection:
    """Evaluate the problem's ``curve_metrics`` on ``loader``, in eval mode; all processes must call it.

    The ``loss`` is added if the problem monitors it.

    Args:
        trainer: the Trainer of the fit.
        task: a ``Task``; the modes of its modules are restored afterwards.
        loader: the loader of this process's share of the samples.
        limit: largest number of batches, or share of them, as in ``Trainer(limit_test_batches=...)``.

    Returns:
        The metrics; ``compute()`` is over all processes.

    Raises:
        ValueError: if there is no sample.
    """
    most = int(limit * len(loader)) if isinstance(limit, float) else limit
    strategy, convert = trainer.strategy, trainer.precision_plugin.convert_input
    wanted: dict[str, Any] = dict(task.problem.curve_metrics())
    if task.problem.monitored == "loss":
        wanted["loss"] = loss_metric()
    metrics = MetricCollection(wanted, compute_groups=False).to(strategy.root_device)
    count = 0
    with evaluating(task):
        for k, batch in enumerate(loader):
            if k == most:
                break
            batch = as_batch(strategy.batch_to_device(convert(batch)))
            task.update_metrics(metrics, batch)
            count += 1
    if not strategy.reduce(torch.tensor(count, device=strategy.root_device), reduce_op="sum"):
        raise ValueError(
            "there is no sample to evaluate on: give the data module a test set, or leave the callback out"
        )
    return metrics
