"""``lightning-kd sharpness``: measure the sharpness of a finished checkpoint's minimum."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L

from lightning_kd.callbacks import SharpnessReport
from lightning_kd.callbacks.sharpness_report import add_entry, keep_slice
from lightning_kd.cli.load_checkpoint import checkpoint_path, load_checkpoint, sample_source
from lightning_kd.metrics.sharpness import PARTS

__all__ = ["sharpness"]

KINDS: dict[str, list[Any]] = {"none": ["none"], "1d": ["1d"], "2d": ["2d"], "both": ["1d", "2d"]}


def sharpness(
    trainer: L.Trainer,
    model: Any,
    datamodule: Any,
    ckpt_path: str | None = None,
    weights_only: bool | None = None,
    samples: int = 1000,
    max_probes: int = 200,
    slices: str = "1d",
    points: int | None = None,
    seed: int = 0,
) -> None:
    """Measure how flat the minimum of a checkpoint is: a table, sharpness.json, pictures of the loss.

    Args:
        ckpt_path: last, best or a path. Default: last.
        samples: number of training samples, without augmentation, over which the loss is the mean.
        max_probes: most Hessian-vector products for the trace; it stops at a standard error of 2 percent.
        slices: pictures of the loss around the weights: 1d, 2d, both or none.
        points: points of a slice along each direction. Default: 51 in 1d, 21 in 2d.
        seed: seed of the samples, the probes and the directions.

    Raises:
        ValueError: for an unknown ``slices``.
    """
    if slices not in KINDS:
        raise ValueError(f"slices must be one of {', '.join(KINDS)}, got {slices!r}")
    path = checkpoint_path(trainer, ckpt_path)
    load_checkpoint(trainer, model, datamodule, path)
    options: dict[str, Any] = {"samples": samples, "max_probes": max_probes, "seed": seed, "points": points}
    for kind in KINDS[slices]:
        first = kind == KINDS[slices][0]
        report = SharpnessReport(slices=kind, which=PARTS if first else (), **options)  # type: ignore[arg-type]
        found, drawn = report.measure(model, sample_source(datamodule))
        if first:
            print(f"\nSharpness of {path}\n{found}")
            add_entry(Path(trainer.default_root_dir), {"checkpoint": str(path), "seed": seed}, found)
        if drawn is not None:
            print(keep_slice(trainer, f"_{path.stem}_{kind}", drawn, f"Loss around the weights of {path.stem}.ckpt"))
