"""Optimum shifting as a callback, during the training or at its end, for any LightningModule.

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
    """Optimum shifting (Zhou et al., AAAI 2025, arXiv 2405.14111) during training or at its end.

    On given samples, many weights of a layer give the same outputs. A shift replaces the weight of a layer by the
    smallest of these: the loss on the samples does not change, but the minimum is flatter, which may generalise better.
    ``shift_network`` does the shift; this callback draws the samples and decides when, for any LightningModule.

    A shift takes place after the last step of an epoch, before its validation and its checkpoint, so that both have the
    shifted weights. If a training ends other than by ``max_epochs`` or ``max_steps``, as by early stopping, the last
    shift comes after the last validation: before the checkpoint if the stop is known by then
    (``EarlyStopping(check_on_train_epoch_end=False)``), else after it. Then ``last.ckpt`` of the run folder is written
    again; the files of your own ``ModelCheckpoint`` lack the shift, and a warning says so.

    The layers are those of the ``main_network`` of a ``Task``, or of the LightningModule itself. The samples come from
    a data module of this package, without augmentation, or from the dataset of the training loader. For batches other
    than ``(image, target)``, or another loss than cross-entropy, override ``output`` and ``loss`` in a subclass.

    Logged with the metrics of the epoch: ``shift/norm_ratio``, ``rank``, ``loss_before``, ``loss_after``,
    ``held_out_before``, ``held_out_after``, ``kappa_before``, ``kappa_after``, ``identity`` and ``undone`` (0 or 1);
    with several layers, ratio and rank of each under its name. All shifts are in ``shifts``, in ``shifts.json`` of the
    run folder and in checkpoints, so a resumed training neither repeats nor skips one. The draws of samples do not
    affect other random numbers.

    With ``WeightAveraging``, ``EMAWeightAveraging`` or ``StochasticWeightAveraging``, which must stand before it in the
    list of callbacks, only the average is shifted, after the training. ``every`` is refused with them, because weights
    before and after a shift must not be averaged. The same holds for layers that no optimizer trains, such as those of
    a task whose ``main_network`` is a running average.

    Problems that can be known at the start of a fit are errors there. A shift that fails later is skipped with a
    warning, and the training goes on.

    Several processes: the samples of all processes count. Sharded weights are refused; a shift that fails is an error.

    Args:
        layers: module paths of linear and convolution layers. Default: the classifier.
        samples: number of samples to shift on, not fewer than classes. Default: see ``shift_samples``.
        selection: ``"class_balanced"``, ``"random"``, ``"class_means"`` (the mean inputs of the classes over the whole
            training set, linear layers only) or ``"all"`` (the whole training set, whose inputs mostly span the whole
            space, so that nothing changes).
        mode: what happens to the bias: ``"fixed"``, ``"joint"`` or ``"free"``; see ``shift_linear``.
        start: share of ``max_epochs`` after which ``every`` begins to count.
        every: shift every so many epochs. Default: only at the end.
        at_end: shift at the end.
        momentum: ``"project"``, ``"keep"`` or ``"zero"``; see ``shift_network``.
        guard: undo a shift if the held-out loss rises by more than this share; ``None``: never.
        held_out: number of other training samples on which the guard measures the loss.
        rtol: see ``shift_linear``.
        seed: seed of the draws of samples, which differ from epoch to epoch.
        force: shift although samples of some classes are missing.

    Attributes:
        shifts: for each shift so far, ``ShiftReport.to_dict()`` with ``epoch``, ``step`` and ``selection``.

    Raises:
        ValueError: for arguments out of range. At the start of a fit: for layers that ``shift_network`` refuses,
            samples that cannot be drawn or lack a class, targets that are no classes, a second OptimumShifting.

    Source: arXiv 2405.14111; schedule, guard and momentum are not in the paper.
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
        """The output of the network for a batch; called in eval mode."""
        image = as_batch(batch).image
        if isinstance(pl_module, Task):
            return logits_of(pl_module.main_network(pl_module.format_image(image)))
        return pl_module(image)

    def loss(self, pl_module: L.LightningModule, output: Any, batch: Any) -> Tensor:
        """The mean loss of ``output`` over the samples of a batch, a scalar."""
        return F.cross_entropy(output.double(), as_batch(batch).target)

    # -- when --------------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if trainer.current_epoch == 0:  # a resumed fit loads those of its checkpoint
            self.shifts = []
        self._average_shifted, self._tried = False, -1
        self._averaged = check_setup(trainer, self, OptimumShifting, self.every, self.start)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write(trainer)  # the shifts of a resumed fit; replaces the file of an earlier fit
        network, num_classes = network_and_classes(trainer, pl_module)
        layers = find_layers(network, self.layers, self.mode)
        # a layer that is not trained may be a running average, which is updated once more after the last step
        self._averaged |= not check_trained(trainer, network, layers, self.every)
        self._check_samples(trainer, pl_module, network, num_classes)

    def _check_samples(
        self, trainer: L.Trainer, pl_module: L.LightningModule, network: nn.Module, num_classes: int | None
    ) -> None:
        """Raise errors of the draw of samples at the start of the fit, not hours later."""
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
            if trainer.world_size > 1:  # the processes must not continue with different weights
                raise
            rank_zero_warn(f"no shift after epoch {self._epoch} ({error}); the training goes on")
            return None

    def _done(self, trainer: L.Trainer) -> bool:
        """Whether a shift of the weights of this step was made or tried."""
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
        for logger in trainer.loggers:  # self.log is not allowed in on_train_end
            logger.log_metrics({**report.metrics(), "epoch": self._epoch}, step=trainer.global_step - 1)
        run, savers = run_folder_of(trainer), trainer.checkpoint_callbacks
        if run is not None and any(isinstance(c, RunCheckpoint) for c in savers):
            trainer.save_checkpoint(run.last)
        others = [type(c).__name__ for c in savers if not isinstance(c, RunCheckpoint)]
        if others:
            rank_zero_warn(
                f"the files of {others[0]} were written before the shift at the end and lack it: save the module by "
                "trainer.save_checkpoint, or let EarlyStopping stop earlier, by check_on_train_epoch_end=False"
            )

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._average_shifted and "current_model_state" in checkpoint:
            # WeightAveraging stored its own copy of the average, which is not shifted
            checkpoint["state_dict"] = checkpoint["current_model_state"]

    def state_dict(self) -> dict[str, Any]:
        return {"shifts": list(self.shifts)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.shifts = list(state_dict["shifts"])

    # -- what --------------------------------------------------------------------------------------------------------

    def shift(self, trainer: L.Trainer, pl_module: L.LightningModule) -> ShiftReport:
        """Shift now, between two steps of a fit, and record it in ``shifts``; all processes must call it."""
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
