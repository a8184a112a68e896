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
from lightning_kd.core.optimization import epoch_steps, make_optimizer, training_length
from lightning_kd.core.quiet import quiet
from lightning_kd.core.seeding import EpochSeeding, global_seed, numpy_generator
from lightning_kd.core.training_watch import TrainingWatch
from lightning_kd.core.two_pass_step import second_pass
from lightning_kd.core.weights import other_classes
from lightning_kd.nets import network_for

__all__ = ["Task"]


class Task(EvaluatedModule):
    """A training method: networks, optimizer, metrics, checkpoints. A subclass adds its ``training_step``.

    What is asked of the network (one class an image, several labels, a class for each pixel) is its ``problem``, of
    the kind ``problem_class``.

    A subclass builds its networks in ``__init__`` by ``self.build(...)``, names the one that answers in
    ``main_network`` and returns ``self.step_loss(terms, logits, target)`` from ``training_step``.

    Metrics: ``train/loss``, each loss term and a cheap metric of the problem per epoch, accumulated
    on the device; ``val/`` and ``test/`` ``loss`` and the metrics of the problem.

    Several processes: metrics are sums over all processes; the loss is the mean over each process's batch, gradients
    are averaged by DDP.

    Args:
        num_classes: number of classes ``C``, for the problem. From the command line it comes from the data module.
        input_shape: shape of one image ``(C, H, W)`` or of one feature row ``(D,)``; likewise.
        optimizer: factory from parameters to an optimizer. Default: SGD, learning rate 0.05, momentum 0.9, weight
            decay 5e-4; in plain training and distillation see ``optimizer_for``.
        lr_scheduler: factory from the optimizer to a scheduler. Default: constant learning rate. Not
            ``ReduceLROnPlateau`` if a resumed run must equal an undisturbed one: Lightning steps it after the
            checkpoint is written.
        lr_interval: ``"epoch"`` or ``"step"``: when the scheduler steps.
        channels_last: memory format of networks and images. Default: on for networks with 2-D convolutions.
        compile: compile the networks in place with ``torch.compile``; worth it only for long runs.
    """

    #: whether ``train/loss``, or ``train/loss_ce``, is the loss of the problem, to be compared with that of guessing
    loss_is_plain = False
    #: what a schedule is to last as long as, in words
    scheduled_part = "training"
    #: what the training sees of an image, see ``SplitLoaders.loader``. Default: the weak view
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
        self._means = EpochMeans()
        self._finite = FiniteGuard()

    # -- networks ----------------------------------------------------------------------------------------------------

    def build(
        self, network: str | nn.Module, input_shape: Sequence[int] | None = None, outputs: int | None = None
    ) -> nn.Module:
        """A network by name (see ``lightning-kd list``) for this task's problem and input, or the given one itself.

        Args:
            network: its name, or the module.
            input_shape: of its images, where they are not those of the task.
            outputs: how many logits it has, where they are not those of the problem.
        """
        if isinstance(network, str):
            if "." in network and "/" not in network:
                raise ValueError(
                    f"network {network!r} looks like a class: write class_path: {network} instead of a name"
                )
            outputs = outputs or self.problem.num_classes
            network = network_for(network, outputs, tuple(input_shape or self.input_shape))
        if self.channels_last is None:
            self.channels_last = len(self.input_shape) == 3 and any(isinstance(m, nn.Conv2d) for m in network.modules())
        if self.channels_last:
            network.to(memory_format=torch.channels_last)
        self._built.append(network)
        return network

    def exports(self) -> dict[str, nn.Module]:
        """Plain networks to write as ``NAME.pt`` into the run folder after ``fit``."""
        return {"network": self.main_network}

    def train_loader(self, data: Any) -> Any:
        """What our data modules feed this task in training: by default every training sample once, augmented.

        A method that needs other views, other streams or several of them overrides it.
        """
        # Trainer(overfit_batches=...) promises the same batches each epoch, but cannot change this loader itself
        overfit = self.trainer.overfit_batches > 0  # type: ignore[attr-defined]
        options = self.view_options() if isinstance(self, Task) else {}  # modules of users come here, too
        return data.loader("train", shuffle=not overfit, augment=True, batch_size=data.batch_size, **options)

    def view_options(self) -> dict[str, Any]:
        """What ``train_loader`` asks of the views of an image beside its augmentation, see ``SplitLoaders.loader``."""
        return {} if self.view is None else {"views": self.view}

    def write_results(self, folder: Path) -> None:
        """Called on every process at the end of training, to leave further files in ``folder``; by default none."""

    @property
    def run_seed(self) -> int:
        """The seed of this run's random streams, the same on all processes."""
        seeds = [c.seed for c in self.trainer.callbacks if isinstance(c, EpochSeeding)]  # type: ignore[attr-defined]
        return seeds[0] if seeds and seeds[0] is not None else global_seed()

    def generator(self, stream: str, pass_: int = 0) -> np.random.Generator:
        """The random stream ``(seed, stream, current epoch, pass, rank)`` of this run."""
        return numpy_generator(self.run_seed, stream, self.current_epoch, pass_, self.global_rank)

    def setup(self, stage: str) -> None:
        self.check_data(getattr(self.trainer, "datamodule", None), has_targets=stage != "predict")
        if self.compile_networks:
            # or a tapped network would reuse the code of an untapped one of its class, and the tap never fire
            torch._dynamo.config.skip_nnmodule_hook_guards = False
            for network in self._built:
                if network._compiled_call_impl is None:
                    network.compile()

    def on_fit_start(self) -> None:
        if self.trainer.ckpt_path is not None:  # its weights have taken the place of those given
            return
        data = getattr(self.trainer, "datamodule", None)
        trained = [network for network in self._built if any(p.requires_grad for p in network.parameters())]
        for what in {other_classes(network, data) for network in trained} - {None}:
            rank_zero_warn(
                f"the given weights were trained on other classes, or in another order ({what}): good to start from, "
                "but what the network answers before it is trained is wrong"
            )

    def format_image(self, image: Tensor) -> Tensor:
        """The image in the memory format of the networks."""
        return image.contiguous(memory_format=torch.channels_last) if self.channels_last and image.ndim == 4 else image

    # -- training ----------------------------------------------------------------------------------------------------

    def training_target(self, batch: Any) -> Tensor | None:
        """The targets in a training batch, as the problem has them, to be checked; ``None`` where there are none."""
        labelled = getattr(batch, "labelled", batch)
        if not isinstance(labelled, tuple | list) or len(labelled) < 2 or not isinstance(labelled[1], Tensor):
            return None
        image, target = labelled[0], labelled[1]
        views = isinstance(image, Tensor) and image.is_floating_point() and image.shape == target.shape
        return None if views and target.ndim > 2 else target  # of two views, for a method of your own

    def configure_callbacks(self) -> list[L.Callback]:
        known: list[L.Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        kinds = (EpochSeeding, TrainingWatch)
        return [kind() for kind in kinds if not any(isinstance(callback, kind) for callback in known)]

    def configure_optimizers(self) -> Any:
        return self.optimizer_and_scheduler([p for p in self.parameters() if p.requires_grad])

    def default_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """What trains where no ``optimizer`` is given."""
        return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4)

    def optimizer_and_scheduler(self, parameters: list[nn.Parameter]) -> Any:
        """What ``configure_optimizers`` returns for these parameters, from the factories."""
        return make_optimizer(self, parameters, self.build_optimizer, self.lr_scheduler_factory, self.lr_interval)

    def build_optimizer(self, parameters: Iterable[Any]) -> torch.optim.Optimizer:
        """The optimizer of these parameters, or groups of them, without a schedule."""
        factory: Any = self.optimizer_factory or self.default_optimizer
        return factory(parameters)

    def steps_of_epoch(self) -> int | None:
        """Optimizer steps of an epoch, of all networks together; ``None`` where that is not known in advance."""
        return epoch_steps(self.trainer)

    def schedule_length(self, unit: str) -> int | None:
        """How long a schedule is that ends with the training: how many times a scheduler steps.

        Args:
            unit: ``"epoch"`` or ``"step"``, as ``lr_interval``.

        Returns:
            At least 1; ``None`` where that is not known in advance.
        """
        return training_length(self.trainer, unit, self.steps_of_epoch)

    def second_stage_begin(self, unit: str) -> int | None:
        """After how many epochs or steps (``unit``) a second stage begins, for schedules of cycles; ``None``: none."""
        return None

    def step_loss(
        self,
        terms: dict[str, Tensor],
        logits: Tensor,
        target: Tensor,
        prefix: str = "",
        counted: Tensor | None = None,
    ) -> Tensor:
        """The sum of the loss terms, after noting them, the problem's training metric and whether all is finite.

        Args:
            terms: scalar losses by name, weighted as they enter the sum; logged as ``train/loss_NAME``.
            logits: of the main network.
            target: the targets, as the problem has them.
            prefix: put before the names, as in ``train/detector_loss``, where another network is trained.
            counted: bool ``[B]``, the samples that the training metric is of. Default: all.

        Raises:
            RuntimeError: if the sum is not finite. On a GPU one or two steps later: the values are fetched while it
                works on, and no step waits for them.
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
            # on the CPU: the bar reads it again in every step
            self.log("loss", loss.detach().cpu(), prog_bar=True, logger=False)
        return loss

    def accumulate(self, names: tuple[str, ...], values: Tensor, weight: int | Tensor) -> None:
        """Add ``values`` ``[len(names)]`` to the epoch's means, logged as ``train/NAME``; nothing leaves the device.

        An optimizer that evaluates the batch twice counts once.
        """
        if not second_pass():
            self._means.add(names, values, weight)

    def on_train_epoch_start(self) -> None:
        self._means.clear()

    def on_train_epoch_end(self) -> None:
        self._finite.check(wait=True)
        self.log_dict({f"train/{name}": value for name, value in self._means.compute(self.trainer.strategy).items()})
        self._means.clear()
