"""Checks at the start of a fit that ``OptimumShifting`` can do its work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.batch import as_batch
from lightning_kd.core.training_subset import Samples, training_samples
from lightning_kd.flatness._row_space import MODES, check_rtol
from lightning_kd.flatness._shift_network import MOMENTUM, SELECTIONS
from lightning_kd.flatness._shift_samples import BY_CLASS


def check_arguments(
    selection: str,
    mode: str,
    momentum: str,
    start: float,
    every: int | None,
    at_end: bool,
    samples: int | None,
    guard: float | None,
    held_out: int,
    rtol: float | None,
    seed: int,
) -> None:
    """Raise a ``ValueError`` for arguments of ``OptimumShifting`` that are out of range."""
    for name, value, known in (
        ("selection", selection, SELECTIONS),
        ("mode", mode, MODES),
        ("momentum", momentum, MOMENTUM),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    check_numbers(least=0, most=1, remedy="give a share of the epochs", start=start)
    check_numbers(least=1, whole=True, optional=True, every=every, samples=samples)
    check_numbers(least=0, whole=True, held_out=held_out, seed=seed)
    check_numbers(least=0, optional=True, remedy="give a share, or null for none", guard=guard)
    check_rtol(rtol)
    if every is None and not at_end:
        raise ValueError("every=None with at_end=False never shifts: give one of them")
    if guard is not None and not held_out:
        raise ValueError(f"guard={guard} needs held-out samples, got held_out={held_out}: take some, or guard=null")


def check_setup(
    trainer: L.Trainer, shifting: L.Callback, kind: type[L.Callback], every: int | None, start: float
) -> bool:
    """Check the Trainer, and return whether one of its callbacks averages the weights.

    Args:
        trainer: the Trainer whose fit begins.
        shifting: the ``OptimumShifting`` among its callbacks.
        kind: the class ``OptimumShifting``.
        every: see ``OptimumShifting``.
        start: see ``OptimumShifting``.

    Raises:
        ValueError: for sharded weights, several ``OptimumShifting``, averaging with ``every`` or after the shift, and
            ``start`` without ``max_epochs``.
    """
    if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy | ModelParallelStrategy):
        raise ValueError(
            f"OptimumShifting needs whole weights, got {type(trainer.strategy).__name__}: train with ddp, or shift "
            "the finished checkpoint"
        )
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if sum(isinstance(c, kind) for c in callbacks) > 1:
        raise ValueError("callbacks hold several OptimumShifting, whose records would mix: give all layers to one")
    averaging = [c for c in callbacks if isinstance(c, WeightAveraging | StochasticWeightAveraging)]
    if averaging:
        name = type(averaging[-1]).__name__
        if every is not None:
            raise ValueError(
                f"every={every} would make the average of {name} a mix of weights before and after a shift: "
                "leave it out, and the average is shifted at the end"
            )
        if callbacks.index(shifting) < callbacks.index(averaging[-1]):
            raise ValueError(f"{name} would overwrite the shift at the end: put OptimumShifting after it in callbacks")
    if every is not None and start and (trainer.max_epochs or -1) < 0:
        raise ValueError(f"start={start} is a share of max_epochs, which this fit lacks: give max_epochs")
    return bool(averaging)


def check_trained(
    trainer: L.Trainer, network: nn.Module, layers: Mapping[str, nn.Linear | nn.Conv2d], every: int | None
) -> bool:
    """Whether an optimizer trains all ``layers``; if not, a ``ValueError`` with ``every``."""
    trained = {id(p) for o in trainer.optimizers for group in o.param_groups for p in group["params"]}
    untrained = [name for name, layer in layers.items() if id(layer.weight) not in trained]
    if untrained and every is not None:
        raise ValueError(
            f"every={every} needs trained layers, but no optimizer trains {untrained[0]!r} of "
            f"{type(network).__name__}; a running average would mix weights before and after a shift: leave every "
            "out, and it is shifted at the end"
        )
    return not untrained


def check_targets(
    source: Any, network: nn.Module, selection: str, cross_entropy: bool, num_classes: int | None, few: int
) -> None:
    """Raise ``ValueError`` if classes are needed, but unknown, or if targets of ``few`` samples are not classes."""
    remedy = "for a regression or one logit take selection='random' and a subclass with its own loss"
    by_class = selection in BY_CLASS
    has_classifier = any(isinstance(m, nn.Linear) for m in network.modules())
    if num_classes is None and (by_class or (cross_entropy and has_classifier)):
        got = "one output" if has_classifier else "no nn.Linear"
        raise ValueError(
            f"{type(network).__name__} has {got} and no num_classes, so the number of classes is unknown: give the "
            f"module num_classes; {remedy}"
        )
    if cross_entropy and not hasattr(source, "train_target"):
        for batch in training_samples(source, few).loader:
            target = as_batch(batch).target
            got = f"{target.dtype} {list(target.shape)}" if isinstance(target, Tensor) else type(target).__name__
            numbers = not isinstance(target, Tensor) or (target.is_floating_point() and target.ndim < 2)
            # class probabilities [N, K] are fine for selections that do not look at classes
            if numbers or (by_class and (target.is_floating_point() or target.ndim != 1)):
                raise ValueError(f"targets must be classes, got {got}: {remedy}")


def check_all_there(source: Any, chosen: Samples, num_classes: int) -> None:
    """Raise ``ValueError`` if the labels of a data module show that ``chosen`` lacks a class."""
    if hasattr(source, "train_target"):
        missing = np.setdiff1d(np.arange(num_classes), source.train_target.numpy()[chosen.indices])
        if len(missing):
            raise ValueError(
                f"the {len(chosen.indices)} samples to shift on lack class {missing[0]}, whose predictions a shift "
                "would destroy: give training data of all classes, with selection='random' more samples, or force=True"
            )
