"""Networks of a round that are trained in turn."""

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
    """Several networks that are trained in turn within each epoch, one of them in each step.

    One optimizer holds all parameters: those of the networks that rest have no gradient, so that it leaves them as they
    are, and all is as if each were trained by itself. With ``limit_train_batches``, ``overfit_batches`` or
    ``fast_dev_run`` the networks take turns step by step, so that all of them are reached.

    Several processes: batches are shared out and gradients averaged after each backward pass, here rather than in DDP,
    which would wait for the networks that rest; ``strategy="ddp"`` is right.
    """

    @abstractmethod
    def phases(self, data: Any) -> list[Phase]:
        """What each network is trained on, in this order."""

    @abstractmethod
    def network_loss(self, batch: PhaseBatch) -> Tensor:
        """The loss of a step of network ``batch.network``, from ``step_loss``."""

    def labelled_loader(self, data: Any, indices: np.ndarray, stream: str, batch_size: int | None = None) -> Any:
        """Training batches of some samples, in an order and views of their own for each name; ``batch_size`` is the
        data's where it is ``None``."""
        overfit = self.trainer.overfit_batches > 0  # type: ignore[attr-defined]
        size = batch_size or data.batch_size
        return data.loader("train", indices, shuffle=not overfit, augment=True, batch_size=size, stream=stream)

    def train_loader(self, data: Any) -> Any:
        limited = self.trainer.limit_train_batches != 1.0  # type: ignore[attr-defined]
        return PhasedLoader(self.phases(data), alternate=limited)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            _ = self.pool  # says what is wrong with another data module

    def steps_of_epoch(self) -> int | None:
        # of the phases as they are now: where a stage begins, the Trainer's loader is that of the one before
        return steps_of(self.trainer, len(self.train_loader(self.pool)))  # type: ignore[arg-type]

    def on_train_start(self) -> None:
        super().on_train_start()
        parallel: Any = getattr(self.trainer.strategy, "model", None)
        if hasattr(parallel, "require_backward_grad_sync"):
            parallel.require_backward_grad_sync = False  # what its no_sync() sets

    def _restart_optimizer(self) -> None:
        """Bring optimizer and scheduler to where they were at the start of the fit."""
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
        # running statistics of process 0, as DDP would share them, before the validation that follows
        if self.trainer.is_last_batch:
            share_buffers(self)
