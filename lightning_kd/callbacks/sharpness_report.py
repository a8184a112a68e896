"""A callback that measures the sharpness of the minimum, during training and at its end."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_kd.argument_checks import check_numbers
from lightning_kd.callbacks.label_pictures import _keep
from lightning_kd.callbacks.slice_figure import slice_figure
from lightning_kd.core.batch import Batch, as_batch
from lightning_kd.core.distributed import together
from lightning_kd.core.feature_hooks import find_classifier
from lightning_kd.core.random_state import same_random_state
from lightning_kd.core.run_callbacks import run_folder_of
from lightning_kd.core.training_subset import sample_source, training_samples
from lightning_kd.file_writing import write_text, written_whole
from lightning_kd.metrics import LossSlice, Sharpness, loss_slice, measure_sharpness
from lightning_kd.metrics.sharpness import PARTS, RHOS


class SharpnessReport(L.Callback):
    """Measure how flat the minimum is, by the curvature of the loss on fixed training samples.

    Logged: ``sharpness/loss``, ``acc``, ``top_eigenvalue``, ``smallest_eigenvalue``, ``trace``, ``kappa``,
    ``feature_trace``, ``nc1``, ``weight_norm`` and ``rise_RHO``; see ``lightning_kd.metrics.Sharpness``. They are also
    printed as a table and written to ``sharpness.json`` of the run folder with the traces of single layers, one entry
    for each epoch. With slices, the picture and its numbers (``.npz``: ``position`` and ``loss``) are written as
    ``pictures/loss_slice_epoch010`` and so on. The weights of the training are exactly those without this callback. A
    part that cannot be measured gives a warning and does not stop the training.

    Compare runs at equal samples and loss. Eigenvalues, traces and rises shrink with the loss, and change when weights
    are rescaled without changing the function (more weight decay makes them larger); ``kappa`` does not.

    In the list of callbacks it must stand after those that change the weights at the end, such as averages of weights
    and ``OptimumShifting``. With ``WeightAveraging``, ``EMAWeightAveraging`` or ``StochasticWeightAveraging`` the
    report at the end is of the average and comes after all epochs, as it does if training stops before ``max_epochs``;
    its numbers go to the loggers, but too late for ``callback_metrics``. Reports by ``every`` are of the trained
    weights.

    Several processes: each measures its share of the samples, the sums are added, and process 0 writes. If one process
    cannot measure its share, there is no report.

    Args:
        every: measure every so many epochs. Default: only at the end.
        at_end: also measure after the last epoch.
        samples: number of training samples, without augmentation.
        which: parts to measure: ``"eigenvalues"``, ``"trace"``, ``"epsilon"`` (rises of the loss), ``"head"``
            (``kappa``, ``feature_trace`` and ``nc1``, if the network ends in its last linear layer).
        rhos: lengths of the ascent steps of ``"epsilon"``.
        steps: Hessian-vector products for the eigenvalues; each costs about as much as 4 gradients of the samples.
        max_probes: most Hessian-vector products for the trace; it stops at a standard error of 2 %.
        slices: draw the loss along ``"1d"`` or ``"2d"`` random directions, or ``"none"``.
        points: points of a slice along each direction. Default: 51, for ``"2d"`` 21 (441 passes over the samples).
        seed: seed of the samples, probes and directions; use the same one for runs that are compared.

    Raises:
        ValueError: for an argument out of range, and at the start of a fit if an average of weights stands after this
            callback.
    """

    def __init__(
        self,
        every: int | None = None,
        at_end: bool = True,
        samples: int = 1000,
        which: Sequence[Literal["eigenvalues", "trace", "epsilon", "head"]] = PARTS,  # type: ignore[assignment]
        rhos: Sequence[float] = RHOS,
        steps: int = 30,
        max_probes: int = 200,
        slices: Literal["none", "1d", "2d"] = "none",
        points: int | None = None,
        seed: int = 0,
    ) -> None:
        check_numbers(least=1, whole=True, optional=True, every=every)
        if every is None and not at_end:
            raise ValueError("SharpnessReport would never measure, got every=None and at_end=False: give one of them")
        check_numbers(least=1, whole=True, samples=samples, steps=steps, max_probes=max_probes)
        check_numbers(least=2, whole=True, optional=True, points=points)
        check_numbers(least=0, whole=True, seed=seed)
        for rho in rhos:
            check_numbers(above=0, rhos=rho)
        if unknown := set(which) - set(PARTS):
            raise ValueError(f"which must be of {list(PARTS)}, got {sorted(unknown)}")
        if slices not in ("none", "1d", "2d"):
            raise ValueError(f"slices must be 'none', '1d' or '2d', got {slices!r}")
        self.every = every
        self.at_end = at_end
        self.samples = samples
        self.which = tuple(which)
        self.rhos = tuple(rhos)
        self.steps = steps
        self.max_probes = max_probes
        self.slices = slices
        self.points = points or (21 if slices == "2d" else 51)
        self.seed = seed
        self._epochs = 0  # number of epochs trained so far
        self._measured = 0  # number of epochs at the latest report
        self._averaged = False

    def loss(self, pl_module: nn.Module, batch: Batch) -> Tensor:
        """The mean loss of a batch whose curvature is measured: the problem's, or cross-entropy. May be overridden."""
        problem = getattr(pl_module, "problem", None)
        loss = F.cross_entropy if problem is None else problem.loss
        return loss(pl_module(batch.image), batch.target)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        averaging = [c for c in callbacks if isinstance(c, WeightAveraging | StochasticWeightAveraging)]
        self._averaged = bool(averaging)
        if averaging and self.at_end and callbacks.index(self) < callbacks.index(averaging[-1]):
            raise ValueError(
                f"SharpnessReport would measure before {type(averaging[-1]).__name__} has set the average: put it "
                "after that in callbacks"
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._epochs = self._measured = 0
        if getattr(trainer, "fast_dev_run", 0):
            return
        path = _folder(trainer) / "sharpness.json"
        if trainer.is_global_zero and path.is_file():  # drop entries of epochs that a resumed fit repeats
            entries = _entries(path)
            kept = [entry for entry in entries if entry.get("epoch", 0) <= trainer.current_epoch]
            if kept:
                write_text(path, json.dumps(kept, indent=2) + "\n")
            else:
                path.unlink(missing_ok=True)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._epochs = epochs = trainer.current_epoch + 1
        last = self.at_end and epochs == trainer.max_epochs
        if last and self._averaged:
            return  # the average is not yet set
        if last or (self.every is not None and epochs % self.every == 0):
            found = self._report(trainer, pl_module, epochs)
            if found is not None:
                pl_module.log_dict(_logged(found), sync_dist=trainer.world_size > 1)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        epochs = self._epochs
        if self._averaged and trainer.max_epochs and trainer.max_epochs > 0:
            epochs = min(epochs, trainer.max_epochs)  # StochasticWeightAveraging may add a pass for statistics
        if not self.at_end or (self._measured == epochs and not self._averaged):
            return
        found = self._report(trainer, pl_module, epochs)
        if found is not None:
            for logger in trainer.loggers:  # self.log is not allowed in on_train_end
                logger.log_metrics({**_logged(found), "epoch": epochs - 1}, step=trainer.global_step - 1)

    def _report(self, trainer: L.Trainer, pl_module: L.LightningModule, epochs: int) -> Sharpness | None:
        if getattr(trainer, "fast_dev_run", 0):
            return None
        self._measured = epochs
        when = f"after {epochs} epoch{'' if epochs == 1 else 's'}"
        found: Sharpness | None = None
        try:
            with same_random_state(pl_module.device):
                found, drawn = self.measure(pl_module, sample_source(trainer))
            if trainer.is_global_zero:
                print(f"\nSharpness {when}\n{found}")
                add_entry(_folder(trainer), {"epoch": epochs}, found)
                if drawn is not None:
                    keep_slice(trainer, f"_epoch{epochs:03d}", drawn, f"Loss around the weights {when}")
        except Exception as error:  # a training must not fail because of a report
            what = "sharpness" if found is None else "file of sharpness"
            rank_zero_warn(f"no {what} {when} ({type(error).__name__}: {error}); the training goes on")
        return found  # the same on all processes, even if process 0 could not write its files

    def measure(self, pl_module: nn.Module, source: Any) -> tuple[Sharpness, LossSlice | None]:
        """Measure a network without writing anything; it can be called without a fit.

        Args:
            pl_module: a LightningModule, or with the default ``loss`` any network.
            source: source of the samples, see ``lightning_kd.core.training_samples``.

        Returns:
            The measures, and the loss along random directions, or ``None`` with ``slices="none"``.
        """
        device = next((p.device for p in pl_module.parameters()), torch.device("cpu"))
        with together(device):
            loader = training_samples(source, self.samples, seed=self.seed, stream="sharpness").loader

        def loss(model: nn.Module, batch: Any) -> Tensor:
            return self.loss(model, as_batch(batch))

        network: nn.Module = getattr(pl_module, "main_network", pl_module)
        try:
            classifier: nn.Module | None = find_classifier(network)[1]
        except ValueError:
            classifier = None
        parameters = _parameters(pl_module, network)
        with _contiguous(pl_module):
            found = measure_sharpness(
                pl_module,
                loss,
                loader,
                num_classes=getattr(pl_module, "num_classes", None),
                classifier=classifier,
                which=self.which,  # type: ignore[arg-type]
                rhos=self.rhos,
                steps=self.steps,
                min_probes=min(30, self.max_probes),
                max_probes=self.max_probes,
                seed=self.seed,
                parameters=parameters,
            )
            if self.slices == "none":
                return found, None
            count = int(self.slices[0])
            drawn = loss_slice(pl_module, loss, loader, count, self.points, seed=self.seed, parameters=parameters)
        return found, drawn


def add_entry(folder: Path, entry: dict[str, Any], found: Sharpness) -> None:
    """Append the measures, together with the values in ``entry``, to the list in ``sharpness.json`` of ``folder``."""
    path = folder / "sharpness.json"
    entries = _entries(path)
    write_text(path, json.dumps([*entries, {**entry, **found.to_dict()}], indent=2) + "\n")


def keep_slice(trainer: L.Trainer, suffix: str, drawn: LossSlice, title: str) -> Path:
    """Write the picture and the numbers of a slice into ``pictures``; returns the path of the picture."""
    _keep(trainer, "loss_slice", suffix, slice_figure(drawn, title))
    path = Path(trainer.default_root_dir) / "pictures" / f"loss_slice{suffix}.png"
    with written_whole(path.with_suffix(".npz")) as part, part.open("wb") as file:
        np.savez(file, position=drawn.position.numpy(), loss=drawn.loss.numpy())
    return path


def _entries(path: Path) -> list[dict[str, Any]]:
    """The list in ``sharpness.json``; a damaged file is renamed, with a warning."""
    if not path.is_file():
        return []
    try:
        entries = json.loads(path.read_text())
        if isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries):
            return entries
        reason = "no list of objects"
    except ValueError as error:
        reason = str(error)
    aside = path.with_suffix(".damaged.json")
    rank_zero_warn(f"{path} is damaged ({reason}): it is renamed to {aside.name}, and a new one is written")
    os.replace(path, aside)
    return []


@contextmanager
def _contiguous(pl_module: nn.Module) -> Iterator[None]:
    """A context in which a task does not use channels_last, in which second derivatives are slower."""
    before = getattr(pl_module, "channels_last", None)
    if before is not True:
        yield
        return
    pl_module.channels_last = False  # type: ignore[assignment]
    try:
        yield
    finally:
        pl_module.channels_last = True  # type: ignore[assignment]


def _folder(trainer: L.Trainer) -> Path:
    run = run_folder_of(trainer)
    return Path(trainer.default_root_dir) if run is None else run.path


def _parameters(pl_module: nn.Module, network: nn.Module) -> list[str] | None:
    """Names of the trainable parameters of ``network``; of all its parameters if none is trainable (an average)."""
    own = {id(p) for p in network.parameters()}
    found = {name: p.requires_grad for name, p in pl_module.named_parameters() if id(p) in own}
    return [name for name, trained in found.items() if trained] or list(found) or None


def _logged(found: Sharpness) -> dict[str, float]:
    values = found.to_dict()
    names = ("top_eigenvalue", "smallest_eigenvalue", "trace", "kappa", "feature_trace", "nc1", "weight_norm")
    numbers = {"loss": values["loss"], "acc": values["accuracy"], **{name: values[name] for name in names}}
    numbers |= {f"rise_{rho}": rise for rho, rise in (values["epsilon_sharpness"] or {}).items()}
    return {f"sharpness/{name}": value for name, value in numbers.items() if value is not None}
