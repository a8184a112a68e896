"""The base of the methods that train two networks, each of which scores the labels for the other."""

from __future__ import annotations

import copy
from abc import ABC
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import chain
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.distributed import average_gradients
from lightning_kd.core.losses import at_least_float32
from lightning_kd.core.outputs import class_logits
from lightning_kd.core.phased_loader import Phase, PhaseBatch, PhasedLoader
from lightning_kd.noisy_labels.noisy_label_task import NoisyLabelTask

__all__ = ["TwoNetworkTask"]


class TwoNetworkTask(NoisyLabelTask, ABC):
    """Base of methods that train two networks of one architecture, each with its own optimizer and scheduler.

    The networks start from different random weights. In every epoch each network in turn passes over its own data
    stream (``phases``); a step trains one of them (``network_step``). Predictions use the sum of both networks' logits,
    probabilities are the mean of theirs.

    Optimization is manual. Clip gradients with ``gradient_clip_val`` here, not in the Trainer; gradient accumulation
    and ``overfit_batches`` are refused. Schedulers step as ``lr_interval`` says, counting a network's own steps;
    precision plugins work as usual. With ``limit_train_batches`` or ``fast_dev_run`` the networks take turns step by
    step, so that both are trained.

    Several processes: each has its part of the batches, and gradients are averaged over the processes after each
    backward pass. All processes make the same number of steps.

    Args:
        network: name of a network, built twice, or an ``nn.Module`` that returns logits ``[B, C]``. The second network
            is then a copy with every layer initialised anew, so the module must not hold trained weights.
        num_classes: see ``Task``.
        input_shape: see ``Task``.
        gradient_clip_val: largest norm of the gradient of one network. Default: no clipping.
        kwargs: ``optimizer``, ``lr_scheduler``, ``lr_interval``, ``channels_last``, ``compile`` of ``Task``.

    Raises:
        ValueError: if an argument is out of range; in a fit, if the Trainer clips or accumulates gradients or overfits
            batches.
    """

    def __init__(
        self,
        network: str | nn.Module,
        num_classes: int,
        *,
        input_shape: Sequence[int] = (3, 32, 32),
        gradient_clip_val: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_classes, input_shape=input_shape, **kwargs)
        check_numbers(above=0, optional=True, remedy="leave it out for none", gradient_clip_val=gradient_clip_val)
        self.automatic_optimization = False
        self.gradient_clip_val = gradient_clip_val
        first = self.build(network)
        self.networks = nn.ModuleList([first, self.build(network if isinstance(network, str) else twin(network))])
        self._active: int | None = None

    def phases(self, data: Any) -> list[Phase]:
        """The data streams of the current epoch, one for each network, in order."""
        raise NotImplementedError(f"{type(self).__name__} must define phases, or its own train_loader")

    def network_step(self, k: int, batch: PhaseBatch) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """One step of network ``k``: its loss terms by name, logits of some samples, and their targets."""
        raise NotImplementedError(f"{type(self).__name__} must define network_step, or its own training_step")

    def parts(self, k: int) -> list[nn.Module]:
        """The modules that are trained with network ``k``."""
        return [self.networks[k]]

    # -- predictions -------------------------------------------------------------------------------------------------

    @property
    def main_network(self) -> nn.Module:
        return self.networks[0]

    def exports(self) -> dict[str, nn.Module]:
        return {f"network_{k + 1}": network for k, network in enumerate(self.networks)}

    def logits_of(self, k: int, image: Tensor) -> Tensor:
        """Logits ``[B, C]`` of network ``k``, float32 or wider."""
        network = self.networks[k]
        (logits,) = at_least_float32(class_logits(network, network(self.format_image(image)), self.num_classes))
        return logits

    def probabilities(self, logits: Tensor) -> Tensor:
        """From one network's logits to probabilities, ``[B, C]``."""
        return logits.softmax(1)

    def forward(self, image: Tensor) -> Tensor:
        """The sum of both networks' logits, ``[B, C]``."""
        return self.logits_of(0, image) + self.logits_of(1, image)

    def scores_and_probabilities(self, image: Tensor) -> tuple[Tensor, Tensor]:
        first, second = (self.logits_of(k, image) for k in range(2))
        return first + second, (self.probabilities(first) + self.probabilities(second)) / 2

    # -- optimization ------------------------------------------------------------------------------------------------

    def configure_callbacks(self) -> list[L.Callback]:
        trainer: Any = self.trainer
        if trainer.state.fn == "fit":  # before Lightning's own check, whose message names no remedy
            if trainer.gradient_clip_val:
                raise ValueError(
                    f"{type(self).__name__} clips each network by itself, got Trainer gradient_clip_val="
                    f"{trainer.gradient_clip_val}: set model.gradient_clip_val instead"
                )
            if trainer.accumulate_grad_batches != 1:
                raise ValueError(
                    f"{type(self).__name__} cannot accumulate gradients, got accumulate_grad_batches="
                    f"{trainer.accumulate_grad_batches}: raise data.batch_size instead"
                )
            if trainer.overfit_batches:
                raise ValueError(
                    f"{type(self).__name__} gives each network its own batches, got overfit_batches="
                    f"{trainer.overfit_batches}: train on a few samples with data.train_per_class instead"
                )
        return super().configure_callbacks()

    def configure_optimizers(self) -> Any:
        configured = []
        for k in range(2):
            parameters = [p for part in self.parts(k) for p in part.parameters() if p.requires_grad]
            configured.append(self.optimizer_and_scheduler(parameters))
        return configured

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            for memory in self.memories.values():  # the streams of the first epoch read them
                memory.allocate(len(self.data.train_target), self.trainer.strategy.root_device)
            self.trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]  # streams change

    def train_loader(self, data: Any) -> Any:
        trainer: Any = self.trainer
        return PhasedLoader(self.phases(data), alternate=trainer.limit_train_batches != 1.0)

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self._active = None

    def training_step(self, batch: PhaseBatch, batch_idx: int) -> None:
        k = batch.network
        if self._active != k:
            self._active = k
            for other in range(2):
                for part in self.parts(other):
                    part.train(other == k)
        self.optimize(k, *self.network_step(k, batch))

    def optimize(self, k: int, terms: dict[str, Tensor], logits: Tensor, target: Tensor) -> None:
        """One optimizer step of network ``k`` on the sum of ``terms``."""
        optimizer: Any = self.optimizers()[k]  # type: ignore[index]
        optimizer.zero_grad()
        loss = self.step_loss(terms, logits, target)
        parallel: Any = getattr(self.trainer.strategy, "model", None)
        unsynchronised = parallel.no_sync if dist.is_initialized() and hasattr(parallel, "no_sync") else nullcontext
        with unsynchronised():  # DDP waits for gradients of every parameter, but only one network has any
            self.manual_backward(loss)
        average_gradients(p for part in self.parts(k) for p in part.parameters())
        optimizer.step()
        if self.lr_interval == "step":
            self._scheduler_step(k)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.gradient_clip_val is not None:  # gradients are unscaled at this point, in every precision
            parameters = chain.from_iterable(group["params"] for group in optimizer.param_groups)
            torch.nn.utils.clip_grad_norm_(parameters, self.gradient_clip_val)

    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        if self.lr_interval == "epoch":
            for k in range(2):
                self._scheduler_step(k)

    def schedule_length(self, unit: str) -> int | None:
        if unit == "step" and self.steps_of_epoch() is None:
            return None
        length = super().schedule_length(unit)
        return length if unit == "epoch" or length is None else (length + 1) // 2  # each network makes half of them

    def _scheduler_step(self, k: int) -> None:
        schedulers: Any = self.lr_schedulers()
        if not schedulers:
            return
        if isinstance(schedulers[k], torch.optim.lr_scheduler.ReduceLROnPlateau):
            monitor = getattr(schedulers[k], "monitor", self.monitor)
            metrics = self.trainer.callback_metrics
            if monitor not in metrics:
                known = ", ".join(sorted(metrics))
                raise ValueError(f"ReduceLROnPlateau monitors {monitor!r}, but logged are {known}: set monitor")
            schedulers[k].step(metrics[monitor])
        else:
            schedulers[k].step()


def twin(network: nn.Module) -> nn.Module:
    """A copy of a network with all layers initialised anew that have ``reset_parameters``."""
    other = copy.deepcopy(network)
    for module in other.modules():
        reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
        if callable(reset):
            reset()
    pairs = zip(network.named_parameters(), other.parameters(), strict=True)
    equal = [name for (name, p), q in pairs if torch.equal(p, q) and bool((p != p.flatten()[0]).any())]
    if equal:
        rank_zero_warn(f"both networks start with the same {', '.join(equal)}: give the network by its name")
    return other
