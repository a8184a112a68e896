"""One pass of a task over a loader, in the middle of a fit."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch

from lightning_kd.core.batch import as_batch
from lightning_kd.metrics import Reliability
from lightning_kd.core.calibration import reliability_sums


def evaluate(trainer: L.Trainer, pl_module: Any, loader: Any, limit: int | float = 1.0) -> tuple[float, Reliability]:
    """Accuracy and calibration of ``pl_module.scores_and_probabilities`` on ``loader``, in eval mode; collective over processes.

    Args:
        trainer: of the fit.
        pl_module: a ``Task``; all its modules are afterwards in the mode they were in.
        loader: of this process's share of the samples.
        limit: the most batches, or the share of them, as in ``Trainer(limit_test_batches=...)``.

    Returns:
        The accuracy in [0, 1] and the reliability of all processes together.
    """
    most = int(limit * len(loader)) if isinstance(limit, float) else limit
    precision, strategy = trainer.precision_plugin, trainer.strategy
    training = [module for module in pl_module.modules() if module.training]
    pl_module.eval()
    parts = []
    try:
        with torch.no_grad(), precision.val_step_context():
            for k, batch in enumerate(loader):
                if k == most:
                    break
                batch = as_batch(strategy.batch_to_device(precision.convert_input(batch)))
                scores, probabilities = pl_module.scores_and_probabilities(batch.image)
                correct = (scores.argmax(1) == batch.target).sum()
                sums = reliability_sums(probabilities, batch.target)
                parts.append(torch.cat([correct[None].to(sums.dtype), sums.flatten()]))
    finally:
        for module in training:
            module.training = True
    if not parts:
        raise ValueError(
            "there is no sample to evaluate on: give the data module a test set, or leave the callback out"
        )
    total = strategy.reduce(torch.stack(parts).sum(0), reduce_op="sum").cpu()
    sums = total[1:].unflatten(0, (3, -1))
    return float(total[0] / sums[0].sum()), Reliability.from_sums(sums)
