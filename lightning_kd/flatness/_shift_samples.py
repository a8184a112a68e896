"""Drawing the training samples for an optimum shift."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
from torch import nn

from lightning_kd.core.feature_hooks import find_classifier
from lightning_kd.core.task import Task
from lightning_kd.core.training_subset import Samples, training_samples
from lightning_kd.flatness._shift_network import find_layers

BY_CLASS = ("class_balanced", "class_means")


def shift_samples(
    source: Any,
    network: nn.Module,
    layers: Sequence[str] | None = None,
    *,
    selection: str = "class_balanced",
    samples: int | None = None,
    held_out: int = 1000,
    num_classes: int | None = None,
    seed: int = 0,
    stream: str = "optimum_shifting",
    force: bool = False,
) -> tuple[Samples, Samples | None]:
    """Draw the training samples to shift ``network`` on, and held-out ones to measure the effect on other samples.

    Args:
        source: see ``core.training_subset.training_samples``.
        network: the network whose layers are shifted.
        layers: module paths of the layers; ``None`` for the classifier.
        selection: ``"class_balanced"`` or ``"random"``; ``"all"`` and ``"class_means"`` take the whole training set.
        samples: number of samples, for ``"class_balanced"`` and ``"random"``. Default: ``min(max(100, 3 K), d - 1)``
            with ``K`` classes and ``d``, the smallest number of inputs of the linear layers: ``d`` samples may span
            the whole space, and then nothing changes.
        held_out: number of held-out samples; if the shift takes the whole training set, a random part of it. 0: none.
        num_classes: ``K``; ``"random"`` and ``"all"`` work without it, but then do not detect missing classes.
        seed: seed of the draw, together with ``stream``.
        stream: a name; different names give different draws.
        force: allow fewer samples than classes.

    Returns:
        ``(shift_set, held_out)``; the second is ``None`` with ``held_out=0``.

    Raises:
        ValueError: for fewer samples than classes, a layer with too few inputs for all classes, or if no samples are
            left to hold out.
    """
    if selection in BY_CLASS and num_classes is None:
        raise ValueError(f"selection {selection!r} needs the number of classes: give num_classes, or take 'random'")
    shift_set: dict[str, Any] = {}
    if selection in ("class_balanced", "random"):
        classes = num_classes or 0
        count = max(100, 3 * classes) if samples is None else samples
        for name, module in find_layers(network, layers).items() if samples is None else ():
            if isinstance(module, nn.Linear):
                count = min(count, module.in_features - 1)
                if count < classes and not force:
                    raise ValueError(
                        f"layer {name!r} has {module.in_features} inputs for {classes} classes, so samples of all "
                        "classes span its inputs and a shift changes nothing: name another layer, or force=True"
                    )
        if count < classes and not force:
            raise ValueError(
                f"samples={count} are fewer than the {num_classes} classes, so a shift would destroy predictions of "
                "the others: take more, or selection='class_means', or shift all the same by force=True"
            )
        shift_set = {"count": max(count, 1), "balanced": selection == "class_balanced", "num_classes": num_classes}
    elif samples is not None:
        raise ValueError(f"selection {selection!r} takes the whole training set, got samples={samples}: leave it out")
    chosen = training_samples(source, seed=seed, stream=stream, **shift_set)
    others = None
    if held_out:
        exclude = chosen.indices if shift_set else None
        others = training_samples(source, held_out, seed=seed, stream=f"{stream}_held_out", exclude=exclude)
    return chosen, others


def network_and_classes(trainer: L.Trainer, pl_module: L.LightningModule) -> tuple[nn.Module, int | None]:
    """The network whose layers are shifted, and the number of classes; ``None`` if it is unknown."""
    network: nn.Module = pl_module.main_network if isinstance(pl_module, Task) else pl_module
    for owner in (pl_module, getattr(trainer, "datamodule", None)):
        number = getattr(owner, "num_classes", None)
        if isinstance(number, int) and number > 1:
            return network, number
    try:
        outputs = find_classifier(network)[1].out_features
    except ValueError:
        return network, None
    return network, outputs if outputs > 1 else None
