"""What ``lightning-kd shift`` and ``lightning-kd sharpness`` do with a finished checkpoint."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import lightning as L
import torch

from lightning_kd.callbacks import SharpnessReport
from lightning_kd.callbacks.sharpness_report import add_entry, keep_slice
from lightning_kd.core.batch import as_batch
from lightning_kd.core.outputs import logits_of
from lightning_kd.core.run_folder import RunFolder, write_text
from lightning_kd.core.task import Task
from lightning_kd.core.training_subset import OnDevice
from lightning_kd.flatness.optimum_shifting import shift_network
from lightning_kd.flatness.shifting_callback import shift_samples
from lightning_kd.metrics.sharpness import PARTS


def shift_checkpoint(
    trainer: L.Trainer,
    task: Task,
    data: Any,
    folder: RunFolder,
    ckpt_path: str,
    *,
    selection: str,
    samples: int | None,
    held_out: int,
    seed: int,
    layers: list[str] | None,
    force: bool,
    output: str | None,
    **options: Any,
) -> Path | None:
    """Shift layers of ``task.main_network``, write the new checkpoint and ``shift.json``, print the report.

    The new checkpoint is the old one with other weights, and with the report under ``optimum_shifting``. Its optimizer
    states are those of the old one: it is meant for tests, predictions and as ``weights`` of another training.

    Returns:
        The path of the new checkpoint; ``None`` where the guard undid the shift and none is written.

    Raises:
        FileExistsError: where there is an ``output`` already, or the default one is the checkpoint itself.
    """
    path = Path(output) if output is not None else Path(ckpt_path).with_name("shifted.ckpt")
    if path.exists() and (output is not None or path.samefile(ckpt_path)):
        raise FileExistsError(f"output {path} exists already: name another file")
    checkpoint = _load(trainer, task, data, ckpt_path)
    network = task.main_network
    chosen, others = shift_samples(
        _source(data),
        network,
        layers,
        selection=selection,
        samples=samples,
        held_out=held_out,
        num_classes=task.num_classes,
        seed=seed,
        force=force,
    )
    report = shift_network(
        network,
        layers,
        OnDevice(trainer, chosen.loader),
        held_out=None if others is None else OnDevice(trainer, others.loader),
        selection=selection,
        num_classes=task.num_classes,
        force=force,
        forward=lambda batch: logits_of(network(task.format_image(as_batch(batch).image))),
        **options,
    )
    print(f"\n{report}")
    found = {"checkpoint": str(ckpt_path), "selection": selection, "seed": seed, **report.to_dict()}
    write_text(folder.path / "shift.json", json.dumps(found, indent=2) + "\n")
    if report.undone:
        print(f"no {path.name} is written; --guard null would keep the shift")
        return None
    state = task.state_dict()
    checkpoint["state_dict"] = {key: state[key].cpu() for key in checkpoint["state_dict"]}
    checkpoint["optimum_shifting"] = found
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(checkpoint, partial)
    os.replace(partial, path)
    return path


def measure_checkpoint(
    trainer: L.Trainer,
    task: Task,
    data: Any,
    folder: RunFolder,
    ckpt_path: str,
    *,
    slices: str,
    points: int | None,
    **options: Any,
) -> None:
    """Print how flat ``task`` is and add it to ``sharpness.json`` of the folder, slices to its ``pictures``."""
    kinds: dict[str, list[Any]] = {"none": ["none"], "1d": ["1d"], "2d": ["2d"], "both": ["1d", "2d"]}
    if slices not in kinds:
        raise ValueError(f"slices must be one of {', '.join(kinds)}, got {slices!r}")
    _load(trainer, task, data, ckpt_path)
    name = Path(ckpt_path).stem
    for kind in kinds[slices]:
        first = kind == kinds[slices][0]
        report = SharpnessReport(slices=kind, points=points, which=PARTS if first else (), **options)  # type: ignore[arg-type]
        found, drawn = report.measure(task, _source(data))
        if first:
            print(f"\nSharpness of {ckpt_path}\n{found}")
            add_entry(folder.path, {"checkpoint": str(ckpt_path), "seed": options["seed"]}, found)
        if drawn is not None:
            print(keep_slice(trainer, f"_{name}_{kind}", drawn, f"Loss around the weights of {name}.ckpt"))


def _source(data: Any) -> Any:
    return data if hasattr(data, "train_target") else data.train_dataloader()


def _load(trainer: L.Trainer, task: Task, data: Any, ckpt_path: str) -> dict[str, Any]:
    """Set up the data, load the weights and move the task to its device; returns the checkpoint."""
    if trainer.world_size > 1:
        raise ValueError(
            f"a checkpoint is shifted and measured by one process, got {trainer.world_size}: add --trainer.devices 1"
        )
    checkpoint = torch.load(ckpt_path, map_location="cpu", weights_only=True)
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(f"ckpt_path {ckpt_path} holds no state_dict: give a checkpoint of lightning-kd fit")
    data.trainer = trainer  # its device, and the labels of the run
    data.prepare_data()
    data.setup(None if hasattr(data, "train_target") else "fit")
    kept = set(checkpoint["state_dict"])
    task.on_load_checkpoint(checkpoint)  # first, as Lightning does: it may put in what the file leaves out
    task.load_state_dict(checkpoint["state_dict"], strict=task.strict_loading)
    checkpoint["state_dict"] = {key: value for key, value in checkpoint["state_dict"].items() if key in kept}
    task.to(trainer.strategy.root_device)
    return checkpoint
