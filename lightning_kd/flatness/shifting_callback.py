"""Optimum shifting in the midst of a training or at its end, of any LightningModule.

Yuyan Zhou, Ye Li, Lei Feng, Sheng-Jun Huang. Improving Generalization of Deep Neural Networks by Optimum Shifting.
AAAI 2025, arXiv 2405.14111.
"""

from __future__ import annotations

import json
import math
from typing import Any

import lightning as L
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_kd.core.batch import as_batch
from lightning_kd.core.outputs import logits_of
from lightning_kd.core.random_state import same_random_state
from lightning_kd.core.run_callbacks import RunCheckpoint, run_folder_of
from lightning_kd.core.task import Task
from lightning_kd.core.training_subset import OnDevice, Samples, sample_source
from lightning_kd.file_writing import write_text
from lightning_kd.flatness._shift_checks import (
    check_all_there,
    check_arguments,
    check_setup,
    check_targets,
    check_trained,
)
from lightning_kd.flatness._shift_network import find_layers, shift_network
from lightning_kd.flatness._shift_report import ShiftReport
from lightning_kd.flatness._shift_samples import network_and_classes, shift_samples

__all__ = ["OptimumShifting", "shift_samples"]


class OptimumShifting(L.Callback):
    """Shift layers of the network during training or at its end (see ``shift_network``), on any LightningModule.

    A shift takes place after the last step of an epoch, before its validation and its checkpoint, so that both are of
    the shifted weights. Where a training ends in another way than by ``max_epochs`` or ``max_steps``, as by early
    stopping, the last shift comes after the last validation: before the checkpoint if the stop is known by then
    (``EarlyStopping(check_on_train_epoch_end=False)``), else after all. Then ``last.ckpt`` of the run folder is written
    again, but a ``ModelCheckpoint`` of one's own has files without the shift, and a warning says so.

    Of a ``Task`` the layers are those of its ``main_network``, of any other LightningModule its own; the samples come
    from a data module of this package without augmentation, or from the dataset of the training loader. A module
    whose batches are no ``(image, target)``, or whose loss is no cross-entropy, takes a subclass of this callback with
    its own ``output`` and ``loss``.

    Logs ``shift/norm_ratio``, ``rank``, ``loss_before``, ``loss_after``, ``held_out_before``, ``held_out_after``,
    ``kappa_before``, ``kappa_after``, ``identity`` and ``undone`` (0 or 1) with the metrics of the epoch; with several
    layers, ratio and rank of each under its name. All shifts are in ``shifts``, ``shifts.json`` of the run folder and
    checkpoints, so that a resumed training neither repeats nor skips one, and its draws do not disturb any
    other: a fit whose shifts are identities is the fit without.

    With ``WeightAveraging``, ``EMAWeightAveraging`` or ``StochasticWeightAveraging``, which must come before it in the
    list of callbacks, the average alone is shifted, after the training; an average over weights before and after a
    shift would be a mix of both, so ``every`` is refused. The same holds for layers that no optimizer trains, as those
    of a task whose ``main_network`` is a running average.

    What cannot be shifted is told at the start of a fit as far as it can be known. A shift that fails later is left
    out with a warning, and the training goes on.

    Several processes: all samples count, as on one process. Sharded weights are refused, and a shift that fails is an
    error.

    Args:
        layers: module paths of linear and convolution layers. Default: the classifier.
        samples: see ``shift_samples``; fewer than classes are refused.
        selection: ``"class_balanced"``, ``"random"``, ``"class_means"`` (the mean inputs of the classes over the whole
            training set, linear layers only) or ``"all"`` (the whole training set, which mostly spans everything).
        mode: of the bias, ``"fixed"``, ``"joint"`` or ``"free"``; see ``shift_linear``.
        start: share of ``max_epochs`` from which ``every`` counts.
        every: shift after so many epochs. Default: at the end alone.
        at_end: shift at the end.
        momentum: ``"project"``, ``"keep"`` or ``"zero"``; see ``shift_network``.
        guard: undo a shift where the held-out loss rises by more than this share; ``None`` for never.
        held_out: number of other training samples that the guard looks at.
        rtol: see ``shift_linear``.
        seed: of the draws; each epoch has its own.
        force: shift without samples of all classes.

    Attributes:
        shifts: of each shift so far, ``ShiftReport.to_dict()`` with ``epoch``, ``step`` and ``selection``.

    Raises:
        ValueError: for arguments out of range, and at the start of a fit for what cannot be shifted in it: layers that
            ``shift_network`` refuses, samples that cannot be drawn or lack a class, targets that are no classes, a
            second OptimumShifting.

    Source: arXiv 2405.14111; it gives no schedule, guard or momentum policy: these are ours.
    """

    def __init__(
        self,
        layers: list[str] | None = None,
        samples: int | None = None,
        selection: str = "class_balanced",
        mode: str = "fixed",
        start: float = 0.5,
        every: int | None = None,
        at_end: bool = True,
        momentum: str = "project",
        guard: float | None = 0.05,
        held_out: int = 1000,
        rtol: float | None = None,
        seed: int = 0,
        force: bool = False,
    ) -> None:
        check_arguments(selection, mode, momentum, start, every, at_end, samples, guard, held_out, rtol, seed)
        self.layers, self.samples, self.selection, self.mode = layers, samples, selection, mode
        self.start, self.every, self.at_end, self.momentum = start, every, at_end, momentum
        self.guard, self.held_out, self.rtol, self.seed, self.force = guard, held_out, rtol, seed, force
        self.shifts: list[dict[str, Any]] = []
        self._epoch = 0
        self._tried = -1
        self._averaged = False
        self._average_shifted = False

    @property
    def state_key(self) -> str:
        return type(self).__qualname__ + (f"[{','.join(self.layers)}]" if self.layers else "")

    # -- for other kinds of batches ----------------------------------------------------------------------------------

    def output(self, pl_module: L.LightningModule, batch: Any) -> Any:
        """What the network gives for a batch, in eval mode."""
        image = as_batch(batch).image
        if isinstance(pl_module, Task):
            return logits_of(pl_module.main_network(pl_module.format_image(image)))
        return pl_module(image)

    def loss(self, pl_module: L.LightningModule, output: Any, batch: Any) -> Tensor:
        """The mean loss of ``output`` over the samples of a batch."""
        return F.cross_entropy(output.double(), as_batch(batch).target)

    # -- when --------------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if trainer.current_epoch == 0:  # before a checkpoint brings its own
            self.shifts = []
        self._average_shifted, self._tried = False, -1
        self._averaged = check_setup(trainer, self, OptimumShifting, self.every, self.start)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write(trainer)  # of the fit that goes on, or none of an earlier one
        network, num_classes = network_and_classes(trainer, pl_module)
        layers = find_layers(network, self.layers, self.mode)
        # a layer that is not trained may move once more after the last step
        self._averaged |= not check_trained(trainer, network, layers, self.every)
        self._check_samples(trainer, pl_module, network, num_classes)

    def _check_samples(
        self, trainer: L.Trainer, pl_module: L.LightningModule, network: nn.Module, num_classes: int | None
    ) -> None:
        """Raise now what the draw of samples would raise after hours."""
        source, given_loss = sample_source(trainer), type(self).loss is OptimumShifting.loss
        last, few = max((trainer.max_epochs or 0) - 1, 0), trainer.world_size
        with same_random_state(pl_module.device):
            check_targets(source, network, self.selection, given_loss, num_classes, few)
            if hasattr(source, "train_target") or self.selection not in ("all", "class_means"):  # cheap to draw
                chosen = self._draw(trainer, network, num_classes, last, min(self.held_out, few))[0]
                if num_classes is not None and not self.force:
                    check_all_there(source, chosen, num_classes)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._epoch = trainer.current_epoch
        most, epochs = trainer.max_steps, trainer.max_epochs
        final = (trainer.is_last_batch and self._epoch + 1 == epochs) or 0 <= most <= trainer.global_step
        if not self._averaged and ((self.at_end and final) or (trainer.is_last_batch and self._due(epochs))):
            self._shift_and_log(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        enough = trainer.current_epoch + 1 >= (trainer.min_epochs or 0)
        enough = enough and trainer.global_step >= (trainer.min_steps or 0)
        if trainer.should_stop and enough and self.at_end and not self._averaged and not self._done(trainer):
            self._shift_and_log(trainer, pl_module)

    def _shift_and_log(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        report = self._try(trainer, pl_module)
        if report is not None:
            several = trainer.world_size > 1
            pl_module.log_dict(report.metrics(), on_step=False, on_epoch=True, batch_size=1, sync_dist=several)

    def _try(self, trainer: L.Trainer, pl_module: L.LightningModule) -> ShiftReport | None:
        self._tried = trainer.global_step
        try:
            return self.shift(trainer, pl_module)
        except ValueError as error:
            if trainer.world_size > 1:  # one process alone must not go on
                raise
            rank_zero_warn(f"no shift after epoch {self._epoch} ({error}); the training goes on")
            return None

    def _done(self, trainer: L.Trainer) -> bool:
        """Whether the weights of this step were shifted, or could not be."""
        return trainer.global_step in (self._tried, *(shift["step"] for shift in self.shifts[-1:]))

    def _due(self, epochs: int | None) -> bool:
        if self.every is None:
            return False
        after = self._epoch + 1 - (math.floor(self.start * epochs) if epochs is not None and epochs > 0 else 0)
        return after > 0 and after % self.every == 0

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        report = self._try(trainer, pl_module) if self.at_end and not self._done(trainer) else None
        if report is None:
            return
        self._average_shifted = self._averaged
        for logger in trainer.loggers:  # a module can log no more
            logger.log_metrics({**report.metrics(), "epoch": self._epoch}, step=trainer.global_step - 1)
        run, savers = run_folder_of(trainer), trainer.checkpoint_callbacks
        if run is not None and any(isinstance(c, RunCheckpoint) for c in savers):
            trainer.save_checkpoint(run.last)
        others = [type(c).__name__ for c in savers if not isinstance(c, RunCheckpoint)]
        if others:
            rank_zero_warn(
                f"the files of {others[0]} were written before the shift at the end and lack it: save the module by "
                "trainer.save_checkpoint, or let EarlyStopping decide earlier, by check_on_train_epoch_end=False"
            )

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._average_shifted and "current_model_state" in checkpoint:
            # by WeightAveraging, whose own copy of the average is not shifted
            checkpoint["state_dict"] = checkpoint["current_model_state"]

    def state_dict(self) -> dict[str, Any]:
        return {"shifts": list(self.shifts)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.shifts = list(state_dict["shifts"])

    # -- what --------------------------------------------------------------------------------------------------------

    def shift(self, trainer: L.Trainer, pl_module: L.LightningModule) -> ShiftReport:
        """Shift now, between two steps of a fit, and note it; collective."""
        network, num_classes = network_and_classes(trainer, pl_module)
        with same_random_state(pl_module.device):
            chosen, others = self._draw(trainer, network, num_classes, self._epoch, self.held_out)
        report = shift_network(
            network,
            self.layers,
            OnDevice(trainer, chosen.loader),
            held_out=None if others is None else OnDevice(trainer, others.loader),
            mode=self.mode,
            rtol=self.rtol,
            selection=self.selection,
            num_classes=num_classes,
            force=self.force,
            guard=self.guard,
            optimizer=trainer.optimizers,
            momentum=self.momentum,
            forward=lambda batch: self.output(pl_module, batch),
            loss_fn=lambda output, batch: self.loss(pl_module, output, batch),
        )
        note = {"epoch": self._epoch, "step": trainer.global_step, "selection": self.selection}
        self.shifts.append({**note, **report.to_dict()})
        if trainer.is_global_zero:
            print(f"shift after epoch {self._epoch}: {report.summary()}")
        self._write(trainer)
        return report

    def _draw(
        self, trainer: L.Trainer, network: nn.Module, num_classes: int | None, epoch: int, held_out: int
    ) -> tuple[Samples, Samples | None]:
        return shift_samples(
            sample_source(trainer),
            network,
            self.layers,
            selection=self.selection,
            samples=self.samples,
            held_out=held_out,
            num_classes=num_classes,
            seed=self.seed,
            stream=f"optimum_shifting_{epoch}",
            force=self.force,
        )

    def _write(self, trainer: L.Trainer) -> None:
        run = run_folder_of(trainer)
        if run is not None and trainer.is_global_zero:
            path = run.path / "shifts.json"
            if self.shifts or path.is_file():
                write_text(path, json.dumps(self.shifts, indent=2) + "\n")
