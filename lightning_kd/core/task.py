"""The base class of all methods."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.epoch_means import EpochMeans
from lightning_kd.core.evaluation import EvaluatedModule
from lightning_kd.core.hyperparameters import keep_plain_hyperparameters, without_module_warning
from lightning_kd.core.nan_guard import FiniteGuard
from lightning_kd.core.optimization import epoch_steps, fit_to_float16, make_optimizer, training_length
from lightning_kd.core.quiet import quiet
from lightning_kd.core.seeding import EpochSeeding, global_seed, numpy_generator
from lightning_kd.core.training_watch import TrainingWatch
from lightning_kd.core.two_pass_step import second_pass
from lightning_kd.core.weights import other_classes
from lightning_kd.nets import network_for

__all__ = ["Task"]


class Task(EvaluatedModule):
    """The base class of all methods: networks, optimizer, metrics, checkpoints. A subclass adds ``training_step``.

    The kind of problem (one class for an image, several labels, a class for each pixel) is ``problem_class``.

    A subclass builds its networks in ``__init__`` by ``self.build(...)``, returns the one to evaluate from
    ``main_network``, and returns ``self.step_loss(terms, logits, target)`` from ``training_step``.

    Logged per epoch: ``train/loss``, each loss term and a cheap metric of the problem, accumulated on the device;
    ``val/loss``, ``test/loss`` and the problem's metrics.

    Several processes: metrics are over all processes; the loss is the mean over each process's batch, and DDP averages
    the gradients.

    Args:
        num_classes: number of classes ``C``. From the command line it comes from the data module.
        input_shape: shape of one image ``(C, H, W)`` or feature row ``(D,)``. Likewise from the data module.
        optimizer: factory from parameters to an optimizer. Default: SGD, learning rate 0.05, momentum 0.9, weight
            decay 5e-4; in plain training and distillation see ``optimizer_for``.
        lr_scheduler: factory from the optimizer to a scheduler. Default: constant learning rate. With
            ``ReduceLROnPlateau``, which Lightning steps after writing the checkpoint, a resumed run differs from an
            uninterrupted one.
        lr_interval: ``"epoch"`` or ``"step"``: when the scheduler steps.
        channels_last: memory format of networks and images. Default: on for networks with 2-D convolutions.
        compile: compile the networks in place with ``torch.compile``; worthwhile only for long runs.
    """

    #: whether ``train/loss`` (or ``train/loss_ce``) is the problem's loss, comparable with that of a random guess
    loss_is_plain = False
    #: the part of the training that a schedule spans, for messages
    scheduled_part = "training"
    #: the view of an image that is trained on, see ``SplitLoaders.loader``. Default: the weak view
    view: str | None = None

    def __init__(
        self,
        num_classes: int,
        *,
        input_shape: Sequence[int] = (3, 32, 32),
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: str = "epoch",
        channels_last: bool | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__()
        quiet()
        problem = self.make_problem(num_classes)
        if lr_interval not in ("epoch", "step"):
            raise ValueError(f"lr_interval must be 'epoch' or 'step', got {lr_interval!r}")
        for size in input_shape:
            check_numbers(least=1, whole=True, input_shape=size)
        with without_module_warning():
            self.save_hyperparameters()
        keep_plain_hyperparameters(self)
        self.set_problem(problem)
        self.input_shape = tuple(input_shape)
        self.optimizer_factory = optimizer
        self.lr_scheduler_factory = lr_scheduler
        self.lr_interval = lr_interval
        self.channels_last = channels_last
        self.compile_networks = compile
        self._built: list[nn.Module] = []
        self._built_by_name = False  # for num_classes and input_shape
        self._means = EpochMeans()
        self._finite = FiniteGuard()

    # -- networks ----------------------------------------------------------------------------------------------------

    def build(
        self, network: str | nn.Module, input_shape: Sequence[int] | None = None, outputs: int | None = None
    ) -> nn.Module:
        """Build a network by name for this task's problem and input, or prepare a given module.

        Args:
            network: a network's name (``lightning-kd list``), or a module.
            input_shape: shape of its images. Default: that of the task.
            outputs: number of logits. Default: that of the problem.
        """
        if isinstance(network, str):
            if "." in network and "/" not in network:
                raise ValueError(
                    f"network {network!r} looks like a class: write class_path: {network} instead of a name"
                )
            outputs = outputs or self.problem.num_classes
            network = network_for(network, outputs, tuple(input_shape or self.input_shape))
            self._built_by_name = True
        if self.channels_last is None:
            self.channels_last = len(self.input_shape) == 3 and any(isinstance(m, nn.Conv2d) for m in network.modules())
        if self.channels_last:
            network.to(memory_format=torch.channels_last)
        self._built.append(network)
        return network

    def exports(self) -> dict[str, nn.Module]:
        """Networks whose ``state_dict`` is written as ``NAME.pt`` into the run folder after ``fit``."""
        return {"network": self.main_network}

    def train_loader(self, data: Any) -> Any:
        """The training loader, made by a data module of lightning_kd: by default each sample once, augmented.

        A method that needs other views, or several loaders, overrides it.
        """
        # Trainer(overfit_batches=...) promises the same batches each epoch, but cannot turn off this loader's shuffling
        overfit = self.trainer.overfit_batches > 0  # type: ignore[attr-defined]
        options = self.view_options() if isinstance(self, Task) else {}  # also called with users' modules
        return data.loader("train", shuffle=not overfit, augment=True, batch_size=data.batch_size, **options)

    def view_options(self) -> dict[str, Any]:
        """Further arguments of ``SplitLoaders.loader`` in ``train_loader``: which views of an image to give."""
        return {} if self.view is None else {"views": self.view}

    def write_results(self, folder: Path) -> None:
        """Write further files into ``folder`` at the end of training; called on every process. Default: none."""

    @property
    def run_seed(self) -> int:
        """The seed of this run's random streams, the same on all processes."""
        seeds = [c.seed for c in self.trainer.callbacks if isinstance(c, EpochSeeding)]  # type: ignore[attr-defined]
        return seeds[0] if seeds and seeds[0] is not None else global_seed()

    def generator(self, stream: str, pass_: int = 0) -> np.random.Generator:
        """A random generator for ``(seed, stream, current epoch, pass, rank)``, see ``derive_seed``."""
        return numpy_generator(self.run_seed, stream, self.current_epoch, pass_, self.global_rank)

    def setup(self, stage: str) -> None:
        self.check_data(getattr(self.trainer, "datamodule", None), has_targets=stage != "predict")
        if self.compile_networks:
            # else a network with a tap may run code compiled for one without, and the tap never fires
            torch._dynamo.config.skip_nnmodule_hook_guards = False
            for network in self._built:
                if network._compiled_call_impl is None:
                    network.compile()

    def on_fit_start(self) -> None:
        if self.trainer.ckpt_path is not None:  # the checkpoint has replaced the given weights
            return
        data = getattr(self.trainer, "datamodule", None)
        trained = [network for network in self._built if any(p.requires_grad for p in network.parameters())]
        for what in {other_classes(network, data) for network in trained} - {None}:
            rank_zero_warn(
                f"the given weights were trained on other classes, or in another order ({what}): training from them is "
                "fine, but predictions before it are wrong"
            )

    def format_image(self, image: Tensor) -> Tensor:
        """The images in the memory format of the networks."""
        return image.contiguous(memory_format=torch.channels_last) if self.channels_last and image.ndim == 4 else image

    # -- training ----------------------------------------------------------------------------------------------------

    def training_target(self, batch: Any) -> Tensor | None:
        """The targets in a training batch that ``check_target`` is to check, or ``None``."""
        labelled = getattr(batch, "labelled", batch)
        if not isinstance(labelled, tuple | list) or len(labelled) < 2 or not isinstance(labelled[1], Tensor):
            return None
        image, target = labelled[0], labelled[1]
        views = isinstance(image, Tensor) and image.is_floating_point() and image.shape == target.shape
        return None if views and target.ndim > 2 else target  # a pair of views without targets

    def configure_callbacks(self) -> list[L.Callback]:
        known: list[L.Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        kinds = (EpochSeeding, TrainingWatch)
        return [kind() for kind in kinds if not any(isinstance(callback, kind) for callback in known)]

    def configure_optimizers(self) -> Any:
        return self.optimizer_and_scheduler([p for p in self.parameters() if p.requires_grad])

    def default_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer if none is given."""
        return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4)

    def optimizer_and_scheduler(self, parameters: list[nn.Parameter]) -> Any:
        """The result of ``configure_optimizers`` for these parameters, from the factories."""
        return make_optimizer(self, parameters, self.build_optimizer, self.lr_scheduler_factory, self.lr_interval)

    def build_optimizer(self, parameters: Iterable[Any]) -> torch.optim.Optimizer:
        """The optimizer for these parameters or parameter groups, without a schedule."""
        factory: Any = self.optimizer_factory or self.default_optimizer
        optimizer = factory(parameters)
        fit_to_float16(optimizer, by_default=self.optimizer_factory is None)
        return optimizer

    def steps_of_epoch(self) -> int | None:
        """Number of optimizer steps in an epoch, of all networks together; ``None`` if unknown in advance."""
        return epoch_steps(self.trainer)

    def schedule_length(self, unit: str) -> int | None:
        """The length of a schedule that ends with the training, in epochs or steps.

        Args:
            unit: ``"epoch"`` or ``"step"``, as ``lr_interval``.

        Returns:
            At least 1; ``None`` if it is not known in advance.
        """
        return training_length(self.trainer, unit, self.steps_of_epoch)

    def second_stage_begin(self, unit: str) -> int | None:
        """The epoch or step (``unit``) with which a second stage begins, for ``OneCycle``; ``None``: no such stage."""
        return None

    def step_loss(
        self,
        terms: dict[str, Tensor],
        logits: Tensor,
        target: Tensor,
        prefix: str = "",
        counted: Tensor | None = None,
    ) -> Tensor:
        """Sum the loss terms, and log them and the problem's training metric.

        Args:
            terms: scalar losses by name, with their weights applied; logged as ``train/loss_NAME``.
            logits: logits of the trained network.
            target: the targets, in the form of the problem.
            prefix: put before the logged names, as in ``train/detector_loss``, for a further network.
            counted: bool ``[B]``, the samples that the training metric counts. Default: all.

        Returns:
            The sum, a scalar.

        Raises:
            RuntimeError: if the sum is not finite. On a GPU one or two steps later, so that no step waits for it.
        """
        parts = list(terms.values())
        loss = parts[0] if len(parts) == 1 else torch.stack(parts).sum()
        names = ("loss",) if len(parts) == 1 else ("loss", *(f"loss_{name}" for name in terms))
        names = tuple(f"{prefix}{name}" for name in names)
        step = self.trainer.global_step
        with torch.no_grad():
            values = torch.stack([loss.detach(), *(part.detach() for part in (parts if len(parts) > 1 else ()))])
            self._finite.record(names, values, logits.detach(), step, self.current_epoch)
            if second_pass():
                return loss
            name = f"{prefix}{self.problem.training_metric}"
            found, labelled = self.problem.training_values(logits, target)
            counted = labelled if counted is None else counted
            found = found.to(values.dtype)
            if counted is None:
                self.accumulate((*names, name), torch.cat([values, found.mean()[None]]), self.problem.count(target))
            else:
                self.accumulate(names, values, self.problem.count(target))
                count = counted.sum()
                self.accumulate((name,), ((found * counted).sum() / count.clamp(min=1))[None], count)
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # 0 with barebones
        if every and step % every == 0 and not prefix:
            # on the CPU, since the progress bar reads it in every step
            self.log("loss", loss.detach().cpu(), prog_bar=True, logger=False)
        return loss

    def accumulate(self, names: tuple[str, ...], values: Tensor, weight: int | Tensor) -> None:
        """Add ``values`` ``[len(names)]`` to the means of the epoch, logged as ``train/NAME``, without a GPU wait.

        The second evaluation of a batch by an optimizer such as SAM does not count.
        """
        if not second_pass():
            self._means.add(names, values, weight)

    def on_train_epoch_start(self) -> None:
        self._means.clear()

    def on_train_epoch_end(self) -> None:
        self._finite.check(wait=True)
        self.log_dict({f"train/{name}": value for name, value in self._means.compute(self.trainer.strategy).items()})
        self._means.clear()
