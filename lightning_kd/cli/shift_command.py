"""``lightning-kd shift``: optimum shifting of a finished checkpoint."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_kd.cli.load_checkpoint import checkpoint_path, load_checkpoint, sample_source
from lightning_kd.core.batch import as_batch
from lightning_kd.core.outputs import logits_of
from lightning_kd.core.training_subset import OnDevice
from lightning_kd.file_writing import write_text, written_whole
from lightning_kd.flatness.optimum_shifting import shift_network
from lightning_kd.flatness.shifting_callback import shift_samples

__all__ = ["next_step", "shift"]


def shift(
    trainer: L.Trainer,
    model: Any,
    datamodule: Any,
    ckpt_path: str | None = None,
    weights_only: bool | None = None,
    layers: list[str] | None = None,
    mode: str = "fixed",
    selection: str | None = None,
    samples: int | None = None,
    held_out: int = 1000,
    guard: float | None = 0.05,
    rtol: float | None = None,
    force: bool = False,
    seed: int = 0,
    output: str | None = None,
) -> Path | None:
    """Shift layers of a checkpoint by optimum shifting; write the new checkpoint and shift.json.

    The new checkpoint has shifted weights and a report under ``optimum_shifting``; everything else is as in the old
    one, also the optimizer states. It is meant for tests, predictions and as ``weights`` of another training.

    Args:
        ckpt_path: last, best or a path. Default: last.
        layers: module paths in the network. Default: its classifier.
        mode: what happens to the bias: fixed, joint or free.
        selection: samples whose outputs must not change: class_balanced, random, class_means, or all of the training
            set. Default: class_balanced, or random for samples without a single class.
        samples: number of these samples. Default: 3 for each class, at least 100, fewer than the layer's inputs.
        held_out: number of other training samples, on which the guard measures the loss.
        guard: undo the shift if the held-out loss rises by more than this share; null for never.
        rtol: singular values up to this share of the largest count as 0. Default: depends on the precision.
        force: shift even if samples of some classes are missing.
        seed: seed of the draw of the samples.
        output: path of the new checkpoint, which must not exist. Default: shifted.ckpt in the folder of the old one.

    Returns:
        The path of the new checkpoint; ``None`` if the guard undid the shift, so that none is written.

    Raises:
        FileExistsError: if ``output`` exists, or the default one is the checkpoint itself.
    """
    old = checkpoint_path(trainer, ckpt_path)
    path = Path(output) if output is not None else old.with_name("shifted.ckpt")
    if path.exists() and (output is not None or path.samefile(old)):
        raise FileExistsError(f"output {path} exists already: name another file")
    problem = model.problem
    selection = selection or ("class_balanced" if problem.one_class else "random")
    if selection in ("class_balanced", "class_means") and not problem.one_class:
        raise ValueError(f"selection {selection!r} needs one class for each sample, got {problem.kind}: take random")
    checkpoint = load_checkpoint(trainer, model, datamodule, old)
    network = model.main_network
    num_classes = problem.num_classes if problem.one_class else None

    def loss(output: Any, batch: Any) -> Tensor:
        batch = as_batch(batch)
        return problem.loss(problem.logits(output, batch.image, network), batch.target)

    chosen, others = shift_samples(
        sample_source(datamodule),
        network,
        layers,
        selection=selection,
        samples=samples,
        held_out=held_out,
        num_classes=num_classes,
        seed=seed,
        force=force,
    )
    report = shift_network(
        network,
        layers,
        OnDevice(trainer, chosen.loader),
        held_out=None if others is None else OnDevice(trainer, others.loader),
        selection=selection,
        num_classes=num_classes,
        force=force,
        loss_fn=None if problem.one_class else loss,
        mode=mode,
        guard=guard,
        rtol=rtol,
        forward=lambda batch: logits_of(network(model.format_image(as_batch(batch).image))),
    )
    print(f"\n{report}")
    found = {"checkpoint": str(old), "selection": selection, "seed": seed, **report.to_dict()}
    write_text(Path(trainer.default_root_dir) / "shift.json", json.dumps(found, indent=2) + "\n")
    if report.undone:
        print(f"no {path.name} is written; --guard null would keep the shift")
        return None
    state = model.state_dict()
    checkpoint["state_dict"] = {key: state[key].cpu() for key in checkpoint["state_dict"]}
    checkpoint["optimum_shifting"] = found
    with written_whole(path) as part:
        torch.save(checkpoint, part)
    return path


def next_step(config: str, path: Path | None) -> str:
    """The next command for a run with this ``config.yaml``; empty if no checkpoint was written."""
    return "" if path is None else f"lightning-kd test --config {config} --ckpt_path {shlex.quote(str(path))}"
