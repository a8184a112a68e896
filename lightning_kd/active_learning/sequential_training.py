"""A base class for methods that train several networks of a round in turn."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from torch import Tensor

from lightning_kd.active_learning.pool_task import PoolTask
from lightning_kd.core.distributed import average_gradients, share_buffers
from lightning_kd.core.optimization import steps_of, tell_length
from lightning_kd.core.phased_loader import Phase, PhaseBatch, PhasedLoader
from lightning_kd.core.training_watch import warn_of_schedules


class SequentialTrainingTask(PoolTask, ABC):
    """Trains several networks in turn within each epoch, one of them in each step.

    One optimizer holds all parameters. Parameters of the networks that are not trained in a step have no gradient, so
    the optimizer does not change them, as if each network had an optimizer of its own. With ``limit_train_batches``,
    ``overfit_batches`` or ``fast_dev_run`` the networks alternate step by step, so that all of them are trained.

    Several processes: use ``strategy="ddp"``. Each process gets its share of the batches; gradients are averaged after
    each backward pass by this class instead of DDP, which would wait for gradients of the other networks.
    """

    @abstractmethod
    def phases(self, data: Any) -> list[Phase]:
        """The training batches of each network, in the order of training within an epoch.

        Args:
            data: the ``OpenSetDataModule``.
        """

    @abstractmethod
    def network_loss(self, batch: PhaseBatch) -> Tensor:
        """The scalar loss of one step of network ``batch.network``, by ``step_loss``."""

    def labelled_loader(self, data: Any, indices: np.ndarray, stream: str, batch_size: int | None = None) -> Any:
        """Shuffled, augmented training batches of some samples.

        Args:
            data: the ``OpenSetDataModule``.
            indices: int64 ``[n]``, positions in the full training array.
            stream: name of the random stream of order and augmentation; different names give different ones.
            batch_size: default: ``data.batch_size``.
        """
        overfit = self.trainer.overfit_batches > 0  # type: ignore[attr-defined]
        size = batch_size or data.batch_size
        return data.loader("train", indices, shuffle=not overfit, augment=True, batch_size=size, stream=stream)

    def train_loader(self, data: Any) -> Any:
        limited = self.trainer.limit_train_batches != 1.0  # type: ignore[attr-defined]
        return PhasedLoader(self.phases(data), alternate=limited)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            _ = self.pool  # raises if the data module is not a pool

    def steps_of_epoch(self) -> int | None:
        # from the current phases: when a stage begins, the Trainer still has the loader of the stage before
        return steps_of(self.trainer, len(self.train_loader(self.pool)))  # type: ignore[arg-type]

    def on_train_start(self) -> None:
        super().on_train_start()
        parallel: Any = getattr(self.trainer.strategy, "model", None)
        if hasattr(parallel, "require_backward_grad_sync"):
            parallel.require_backward_grad_sync = False  # as DDP's no_sync() does

    def _restart_optimizer(self) -> None:
        """Reset optimizer and scheduler to their state at the start of the fit."""
        fresh = self.configure_optimizers()
        scheduler = fresh.get("lr_scheduler") if isinstance(fresh, dict) else None
        optimizer = fresh["optimizer"] if isinstance(fresh, dict) else fresh
        self.trainer.optimizers[0].load_state_dict(optimizer.state_dict())
        if scheduler is not None:
            config = self.trainer.lr_scheduler_configs[0]
            tell_length(config.scheduler, self, config.interval)
            config.scheduler.load_state_dict(scheduler["scheduler"].state_dict())
            warn_of_schedules(self.trainer, self)

    def training_step(self, batch: PhaseBatch, batch_idx: int) -> Tensor:
        return self.network_loss(batch)

    def on_after_backward(self) -> None:
        average_gradients(self.parameters())

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        # as DDP does: buffers (running statistics) of process 0 go to all, before the validation that follows
        if self.trainer.is_last_batch:
            share_buffers(self)
