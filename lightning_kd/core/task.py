"""The base class of all methods."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from lightning_kd.core.batch import as_batch
from lightning_kd.core.nan_guard import FiniteGuard
from lightning_kd.core.outputs import class_logits
from lightning_kd.core.seeding import EpochSeeding, global_seed, numpy_generator
from lightning_kd.core.two_pass_step import second_pass
from lightning_kd.nets import network_for

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Task"]

_NOT_PLAIN = object()


class Task(L.LightningModule):
    """A classification method: networks, optimizer, metrics, checkpoints. A subclass adds its ``training_step``.

    A subclass builds its networks in ``__init__`` by ``self.build(...)``, names the one that answers in
    ``main_network`` and returns ``self.step_loss(terms, logits, target)`` from ``training_step``.

    Metrics: ``train/loss``, each loss term and ``train/acc`` per epoch, accumulated on the device; ``val/`` and
    ``test/`` ``loss``, ``acc``, ``ece`` (15 bins) and, with more than 10 classes, ``acc5``.

    Several processes: metrics are sums over all processes; the loss is the mean over each process's batch, gradients
    are averaged by DDP.

    Args:
        num_classes: number of classes ``C``. From the command line it comes from the data module.
        input_shape: shape of one image ``(C, H, W)`` or of one feature row ``(D,)``; likewise.
        optimizer: factory from parameters to an optimizer. Default: SGD, learning rate 0.05, momentum 0.9, weight
            decay 5e-4.
        lr_scheduler: factory from the optimizer to a scheduler. Default: constant learning rate. Not
            ``ReduceLROnPlateau`` if a resumed run must equal an undisturbed one: Lightning steps it after the
            checkpoint is written.
        lr_interval: ``"epoch"`` or ``"step"``: when the scheduler steps.
        channels_last: memory format of networks and images. Default: on for networks with 2-D convolutions.
        compile: compile the networks in place with ``torch.compile``; worth it only for long runs.
    """

    monitor = "val/acc"
    monitor_mode = "max"

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
        if not isinstance(num_classes, int) or num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes}: a data module must have num_classes")
        if lr_interval not in ("epoch", "step"):
            raise ValueError(f"lr_interval must be 'epoch' or 'step', got {lr_interval!r}")
        # Names and numbers go into the checkpoint; modules, functions and other objects would need unpickling.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*is an instance of `nn.Module`.*")
            self.save_hyperparameters()
        for key, value in list(self.hparams.items()):
            plain = _plain(value)
            for stored in (self.hparams, self._hparams_initial):
                if plain is _NOT_PLAIN:
                    stored.pop(key, None)  # type: ignore[union-attr, operator]
                else:
                    stored[key] = plain  # type: ignore[index, operator]
        self.num_classes = num_classes
        self.input_shape = tuple(input_shape)
        self.optimizer_factory = optimizer
        self.lr_scheduler_factory = lr_scheduler
        self.lr_interval = lr_interval
        self.channels_last = channels_last
        self.compile_networks = compile
        self.loaded_progress: tuple[int, int] | None = None
        self._built: list[nn.Module] = []
        self._sums: dict[tuple[str, ...], list[Any]] = {}
        self._finite = FiniteGuard()
        self.val_metrics = _eval_metrics(num_classes, "val/")
        self.test_metrics = _eval_metrics(num_classes, "test/")

    # -- networks ----------------------------------------------------------------------------------------------------

    def build(self, network: str | nn.Module, input_shape: Sequence[int] | None = None) -> nn.Module:
        """A network by name (see ``lightning-kd list``) for this task's classes and input, or the given one itself.

        Args:
            network: its name, or the module.
            input_shape: of its images, where they are not those of the task.
        """
        if isinstance(network, str):
            if "." in network and "/" not in network:
                raise ValueError(
                    f"network {network!r} looks like a class: write class_path: {network} instead of a name"
                )
            network = network_for(network, self.num_classes, tuple(input_shape or self.input_shape))
        if self.channels_last is None:
            self.channels_last = len(self.input_shape) == 3 and any(isinstance(m, nn.Conv2d) for m in network.modules())
        if self.channels_last:
            network.to(memory_format=torch.channels_last)
        self._built.append(network)
        return network

    @property
    def main_network(self) -> nn.Module:
        """The network that is tested, used for predictions and exported."""
        raise AttributeError(f"{type(self).__name__} names no main_network: return the network that answers")

    def exports(self) -> dict[str, nn.Module]:
        """Plain networks to write as ``NAME.pt`` into the run folder after ``fit``."""
        return {"network": self.main_network}

    def train_loader(self, data: Any) -> Any:
        """What our data modules feed this task in training: by default every training sample once, augmented.

        A method that needs other views, other streams or several of them overrides it.
        """
        # Trainer(overfit_batches=...) promises the same batches each epoch, but cannot change this loader itself
        overfit = self.trainer.overfit_batches > 0  # type: ignore[attr-defined]
        return data.loader("train", shuffle=not overfit, augment=True, batch_size=data.batch_size)

    def write_results(self, folder: Path) -> None:
        """Called on every process at the end of training, to leave further files in ``folder``; by default none."""

    def generator(self, stream: str, pass_: int = 0) -> np.random.Generator:
        """The random stream ``(seed, stream, current epoch, pass, rank)`` of this run."""
        seeds = [c.seed for c in self.trainer.callbacks if isinstance(c, EpochSeeding)]  # type: ignore[attr-defined]
        seed = seeds[0] if seeds and seeds[0] is not None else global_seed()
        return numpy_generator(seed, stream, self.current_epoch, pass_, self.global_rank)

    def setup(self, stage: str) -> None:
        if self.compile_networks:
            # or a tapped network would reuse the code of an untapped one of its class, and the tap never fire
            torch._dynamo.config.skip_nnmodule_hook_guards = False
            for network in self._built:
                if network._compiled_call_impl is None:
                    network.compile()

    def format_image(self, image: Tensor) -> Tensor:
        """The image in the memory format of the networks."""
        return image.contiguous(memory_format=torch.channels_last) if self.channels_last and image.ndim == 4 else image

    def forward(self, image: Tensor) -> Tensor:
        """Logits ``[B, C]`` of the main network.

        Raises:
            ValueError: if the network gives anything else.
        """
        network = self.main_network
        return class_logits(network, network(self.format_image(image)), self.num_classes)

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """Lightning's, with ``weights_only=True`` unless said otherwise: nothing but tensors and plain values is read.

        A network that was given as a module is not in the checkpoint's hyperparameters: give it again.
        """
        kwargs.setdefault("weights_only", True)
        return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.loaded_progress = (checkpoint["epoch"], checkpoint["global_step"])

    # -- training ----------------------------------------------------------------------------------------------------

    def configure_callbacks(self) -> list[L.Callback]:
        known = [c for c in self.trainer.callbacks if isinstance(c, EpochSeeding)]  # type: ignore[attr-defined]
        return [] if known else [EpochSeeding()]

    def configure_optimizers(self) -> Any:
        return self.optimizer_and_scheduler([p for p in self.parameters() if p.requires_grad])

    def optimizer_and_scheduler(self, parameters: list[nn.Parameter]) -> Any:
        """What ``configure_optimizers`` returns for these parameters, from the factories."""
        if self.optimizer_factory is None:
            optimizer: torch.optim.Optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4)
        else:
            optimizer = self.optimizer_factory(parameters)
        if self.lr_scheduler_factory is None:
            return optimizer if self.automatic_optimization else {"optimizer": optimizer}
        scheduler = {"scheduler": self.lr_scheduler_factory(optimizer), "interval": self.lr_interval}
        plateau = isinstance(scheduler["scheduler"], torch.optim.lr_scheduler.ReduceLROnPlateau)
        if plateau and self.automatic_optimization:
            scheduler["monitor"] = getattr(scheduler["scheduler"], "monitor", self.monitor)
            scheduler["frequency"] = self.trainer.check_val_every_n_epoch or 1  # type: ignore[attr-defined]
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def step_loss(
        self,
        terms: dict[str, Tensor],
        logits: Tensor,
        target: Tensor,
        prefix: str = "",
        counted: Tensor | None = None,
    ) -> Tensor:
        """The sum of the loss terms, after noting them, the accuracy and whether all is finite.

        Args:
            terms: scalar losses by name, weighted as they enter the sum; logged as ``train/loss_NAME``.
            logits: ``[B, C]`` of the main network.
            target: int64 ``[B]``.
            prefix: put before the names, as in ``train/detector_loss``, where another network is trained.
            counted: bool ``[B]``, the samples that the accuracy is of. Default: all.

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
            self._finite.note(names, values, logits.detach(), step, self.current_epoch)
            if second_pass():
                return loss
            right = logits.argmax(1) == target
            if counted is None:
                accuracy = right.to(values.dtype).mean()
                self.accumulate((*names, f"{prefix}acc"), torch.cat([values, accuracy[None]]), len(target))
            else:
                self.accumulate(names, values, len(target))
                count = counted.sum()
                accuracy = (right & counted).sum().to(values.dtype) / count.clamp(min=1)
                self.accumulate((f"{prefix}acc",), accuracy[None], count)
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # 0 with barebones
        if every and step % every == 0 and not prefix:
            # on the CPU: the bar reads it again in every step
            self.log("loss", loss.detach().cpu(), prog_bar=True, logger=False)
        return loss

    def accumulate(self, names: tuple[str, ...], values: Tensor, weight: int | Tensor) -> None:
        """Add ``values`` ``[len(names)]`` to the epoch's means, logged as ``train/NAME``; nothing leaves the device.

        An optimizer that evaluates the batch twice counts once.
        """
        if second_pass():
            return
        entry = self._sums.get(names)
        if entry is None:  # terms may come and go between epochs
            wide = torch.float32 if values.device.type == "mps" else torch.float64
            self._sums[names] = entry = [torch.zeros_like(values, dtype=wide), 0]
        if isinstance(weight, int):
            entry[0].add_(values, alpha=weight)
        else:
            entry[0].add_(values * weight)
        entry[1] = entry[1] + weight

    def on_train_epoch_start(self) -> None:
        self._sums.clear()

    def on_train_epoch_end(self) -> None:
        self._finite.check(wait=True)
        joint: dict[str, list[float]] = {}
        for names, (sums, weight) in self._sums.items():
            total = self.trainer.strategy.reduce(torch.cat([sums, sums.new_tensor([weight])]), reduce_op="sum").tolist()
            for name, value in zip(names, total[:-1], strict=True):  # a term may be there in some steps only
                entry = joint.setdefault(name, [0.0, 0.0])
                entry[0] += value
                entry[1] += total[-1]
        self.log_dict({f"train/{name}": value / weight for name, (value, weight) in joint.items() if weight})
        self._sums.clear()

    # -- evaluation --------------------------------------------------------------------------------------------------

    def answer(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """What is evaluated: scores whose largest is the prediction, and probabilities, both float32 ``[B, C]``.

        By default the logits and their softmax.
        """
        logits = self(image).float()
        return logits, logits.softmax(1)

    def _evaluate(self, batch: Any, metrics: MetricCollection) -> None:
        batch = as_batch(batch)
        scores, probabilities = self.answer(batch.image)
        if type(self).answer is Task.answer:
            loss = F.cross_entropy(scores, batch.target)
        else:
            tiny = torch.finfo(probabilities.dtype).tiny
            loss = F.nll_loss(probabilities.clamp_min(tiny).log(), batch.target)
        metrics["loss"].update(loss, len(scores))
        for name, metric in metrics.items(keep_base=True):
            if name != "loss":
                metric.update(probabilities if name == "ece" else scores, batch.target)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, self.val_metrics)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, self.test_metrics)

    def on_validation_epoch_start(self) -> None:
        # here, not at the end: what validate() resets in inference mode, a later fit could not update
        self.val_metrics.reset()

    def on_test_epoch_start(self) -> None:
        self.test_metrics.reset()

    def on_validation_epoch_end(self) -> None:
        self._log_metrics(self.val_metrics)

    def on_test_epoch_end(self) -> None:
        self._log_metrics(self.test_metrics)

    def _log_metrics(self, metrics: MetricCollection) -> None:
        values = metrics.compute()
        # metrics are synchronised already; acc is worth a place in the bar
        self.log_dict({k: v for k, v in values.items() if not k.endswith("/acc")})
        self.log_dict({k: v for k, v in values.items() if k.endswith("/acc")}, prog_bar=True)

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """``prediction`` int64 ``[B]``, ``probabilities`` float32 ``[B, C]`` and, where the batch has it, ``index``."""
        batch = as_batch(batch)
        scores, probabilities = self.answer(batch.image)
        index = {} if batch.index is None else {"index": batch.index}
        return {**index, "prediction": scores.argmax(1), "probabilities": probabilities}


def _plain(value: Any) -> Any:
    """``value`` as what ``torch.load(weights_only=True)`` reads, or ``_NOT_PLAIN``."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        parts = {str(k): _plain(v) for k, v in value.items()}
        return _NOT_PLAIN if any(v is _NOT_PLAIN for v in parts.values()) else parts
    if isinstance(value, list | tuple):
        items = [_plain(v) for v in value]
        return (
            _NOT_PLAIN if any(v is _NOT_PLAIN for v in items) else (items if isinstance(value, list) else tuple(items))
        )
    return _NOT_PLAIN


def _eval_metrics(num_classes: int, prefix: str) -> MetricCollection:
    metrics: dict[str, Any] = {
        "loss": MeanMetric(),
        "acc": MulticlassAccuracy(num_classes, average="micro"),
        "ece": MulticlassCalibrationError(num_classes, n_bins=15),
    }
    if num_classes > 10:
        metrics["acc5"] = MulticlassAccuracy(num_classes, average="micro", top_k=5)
    return MetricCollection(metrics, prefix=prefix, compute_groups=False)
