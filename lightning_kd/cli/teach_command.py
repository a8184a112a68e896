"""``lightning-kd teach``: store a teacher's logits for every view of the training images, for many students."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import lightning as L
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lightning_kd.core.notes import note
from lightning_kd.distillation.distillation_task import Distillation
from lightning_kd.distillation.teaching import teach_store

__all__ = ["check", "teach"]


def teach(
    trainer: L.Trainer,
    model: Any,
    datamodule: Any,
    ckpt_path: str | None = None,
    weights_only: bool | None = None,
    out: str | None = None,
    views: str = "all",
    dtype: Literal["float16", "float32"] = "float16",
    compress: str | None = None,
    temperature: float = 1.0,
    samples: Literal["used", "all"] = "used",
    seed: int = 0,
    batch_size: int = 256,
    restart: bool = False,
) -> Path:
    """Store the teacher's logits for every view of the training images; fit then takes --model.teacher_store FILE.

    After an interruption the same command resumes. Started several times, on several GPUs, the processes share the
    work. data.num_workers processes decode image files.

    Args:
        ckpt_path: not used; the teacher is that of the config.
        out: the file; FILE.json in the same folder describes it. Default: the path of the teacher's weights with the
            suffix .store.
        views: all: every crop and flip that training can draw (162 on CIFAR), so that training with the store equals
            training with the teacher; plain: the images without augmentation; a number: so many views of each image,
            drawn once. Training then sees only these: a smaller file, but fewer different images.
        dtype: dtype of the stored logits.
        compress: store the most probable classes instead of all logits: hard, smoothing, marginal_smoothing_k5 or
            marginal_renorm_k5 (or another number than 5).
        temperature: temperature of the softmax before compress; only with compress.
        samples: used: the training samples of this config; all: the whole training array, for other splits and subsets.
        seed: seed of the draw of views.
        batch_size: number of views in a batch of the teacher.
        restart: discard the content of an existing file.

    Returns:
        The path of the file.

    Raises:
        ValueError: unless this is a distillation by logits on data whose views can be counted.
    """
    weights = model.teacher_arguments["weights"] if isinstance(model, Distillation) else None
    if weights in (None, "default", "random") or isinstance(weights, list):  # a list: several teachers
        beside = Path(trainer.default_root_dir) / "teacher.store"
    else:
        beside = Path(weights).with_suffix(".store")
    path = (beside if out is None else Path(out)).expanduser()
    trainer.validate(model, datamodule, verbose=False)  # sets everything up, and evaluates the teacher
    reached = {
        name.removeprefix("val/teacher_"): float(value)
        for name, value in trainer.callback_metrics.items()
        if name.startswith("val/teacher_")
    }
    model.to(trainer.strategy.root_device)
    with _bar(trainer) as progress:
        header = teach_store(
            model,
            datamodule,
            path,
            views=views,
            dtype=dtype,
            compress=compress,
            temperature=temperature,
            samples=samples,
            seed=seed,
            batch_size=batch_size,
            restart=restart,
            reached=reached,
            first=trainer.global_rank / trainer.world_size,
            progress=progress,
        )
    if trainer.is_global_zero:
        _tell(path, header, views, datamodule)
    return path


def check(config: Any) -> None:
    """Remove ``teacher_store`` from the settings, so that the teacher itself is built."""
    arguments = config.model.get("init_args")
    if arguments is not None and arguments.get("teacher_store") is not None:
        arguments["teacher_store"] = None


def _tell(path: Path, header: dict[str, Any], views: str, data: Any) -> None:
    count = sum(stop - start for start, stop in header["samples"])
    what = "logits" if header["answers"] == "logits" else f"labels {header['answers']}"
    each = f"{header['keys']} view{'s' * (header['keys'] > 1)} of {count} images"
    print(f"{path}: {what} of {each}, {header['dtype']}, {path.stat().st_size / 1e9:.3g} GB")
    if views.isdecimal():
        note(f"training with this store sees {views} fixed views of each image, not all that its augmentation can draw")
    elif views == "plain" and data.crop_flip is not None:
        note("this store is for training without augmentation: add --data.augment false")
    print(f"next: lightning-kd fit --config ... --model.teacher_store {shlex.quote(str(path))}")


@contextmanager
def _bar(trainer: L.Trainer) -> Iterator[Callable[[int, int], None] | None]:
    if not trainer.is_global_zero or trainer.progress_bar_callback is None:
        yield None
        return
    columns = TextColumn("teacher"), BarColumn(), TextColumn("{task.completed}/{task.total} pieces")
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn()) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
