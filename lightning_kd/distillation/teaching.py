"""Run the teacher of a distillation once and store its outputs for all later trainings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.random_draws import count_draws
from lightning_kd.core.teacher import FrozenTeacher
from lightning_kd.core.view_keys import ViewKeys
from lightning_kd.distillation._store_header import FORMAT, ranges_of, weights_digests
from lightning_kd.distillation.distillation_task import Distillation
from lightning_kd.distillation.soft_labels import kept_classes
from lightning_kd.distillation.store_filling import begin_store, fill_store, remove_store, weights_digest

__all__ = ["teach_store"]

# approximate number of rows per piece: a few seconds of computation
ROWS_OF_PIECE = 4096


def teach_store(
    task: Distillation,
    data: Any,
    path: str | Path,
    *,
    views: str = "all",
    dtype: Literal["float16", "float32"] = "float16",
    compress: str | None = None,
    temperature: float = 1.0,
    samples: Literal["used", "all"] = "used",
    seed: int = 0,
    batch_size: int = 256,
    restart: bool = False,
    reached: dict[str, float] | None = None,
    first: float = 0.0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Store the logits of a distillation's teacher for all views of the training images; continues unfinished stores.

    Several processes may fill one file together: each computes pieces that no other one works on, and returns when all
    are finished.

    Args:
        task: the distillation whose ``teacher_logits`` are stored; on its device and set up.
        data: the data module, set up.
        path: the file; ``PATH.json`` next to it describes the content.
        views: ``"all"``: every crop and flip that training can draw, so that training is the same as with the teacher
            itself; ``"plain"``: the images without augmentation, for training without it; a number: so many random
            views of each image, drawn once, which is a less varied distribution of images.
        dtype: dtype of the stored values.
        compress: a kind of soft label to store instead of logits, see ``soft_labels.compress``.
        temperature: temperature of the softmax before ``compress``; must be 1 without ``compress``.
        samples: ``"used"``: the training samples that ``task`` uses of ``data`` now; ``"all"``: the full training
            array, so that other splits and subsets can be used too.
        seed: seed of random views.
        batch_size: number of views per forward pass of the teacher.
        restart: delete an existing store first.
        reached: the teacher's validation metrics by name, which trainings log.
        first: where this process starts, see ``fill_store``.
        progress: see ``fill_store``.

    Returns:
        The content of ``PATH.json``.

    Raises:
        ValueError: if an argument is out of range, the method or the data cannot use a store, and see ``fill_store``.
        FileExistsError, OSError: see ``begin_store``.
    """
    if not isinstance(task, Distillation):
        raise ValueError(f"teach needs a distillation, whose teacher it asks, got {type(task).__name__}: name another")
    name = type(task).__name__
    if task.looks_into_teacher:
        raise ValueError(f"{name} looks into the teacher, of which a store holds the logits alone: take another method")
    if task.teacher_store is not None:
        raise ValueError(f"teach asks the teacher itself, got teacher_store={task.teacher_store!r}: leave it out")
    if not hasattr(data, "training_images"):
        raise ValueError(f"teach needs a data module of this package, got {type(data).__name__}: take another")
    if dtype not in ("float16", "float32"):
        raise ValueError(f"dtype must be 'float16' or 'float32', got {dtype!r}: give one of them")
    if samples not in ("used", "all"):
        raise ValueError(f"samples must be 'used' or 'all', got {samples!r}: give one of them")
    check_numbers(above=0, temperature=temperature)
    check_numbers(least=1, whole=True, batch_size=batch_size)
    if compress is None and temperature != 1:
        raise ValueError(f"temperature is of compress, got temperature={temperature} without it: leave it out")
    if compress is not None:
        kept_classes(compress, task.num_classes, "compress")
        if not task.problem.one_class:
            raise ValueError(f"compress is for one class a sample, the data has {task.problem.kind}: leave it out")
    if not (views in ("all", "plain") or (views.isdecimal() and int(views) > 0)):
        raise ValueError(f"views must be 'all', 'plain' or a number above 0, got {views!r}: give one of them")
    keys = ViewKeys(int(views), seed) if views.isdecimal() else ViewKeys()
    loader = data.loader("train", augment=views != "plain", view_keys=keys)
    indices = task.training_indices(data) if samples == "used" else np.arange(len(data.train_target))
    header = {
        "format": FORMAT,
        "answers": compress or "logits",
        "dtype": dtype,
        "temperature": temperature if compress else None,
        "num_classes": task.num_classes,
        "keys": loader.key_count,
        "piece": max(1, ROWS_OF_PIECE // loader.key_count),
        "samples": ranges_of(indices),
        "views": loader.describe_keys(),
        "teacher": _teacher(task),
        "data": data.training_images(),
        "precision": str(task.trainer.precision),
        "reached": reached or {},
    }
    header = json.loads(json.dumps(header))
    path, trainer = Path(path).expanduser(), task.trainer
    if restart:  # other processes must not continue the deleted store
        if trainer.is_global_zero:
            remove_store(path)
        trainer.strategy.barrier("restart")
    begin_store(path, header)

    def logits(image: Tensor) -> Tensor:
        precision = task.trainer.precision_plugin
        with torch.inference_mode(), precision.val_step_context():
            return task.teacher_logits(precision.convert_input(image.to(task.device)))

    fill_store(
        path,
        header,
        logits,
        images=loader.images_of,
        batch_size=batch_size,
        first=first,
        progress=progress,
        beside=loader.crops_of,
    )
    return header


def _teacher(task: Distillation) -> dict[str, Any]:
    asked = task.teacher_arguments
    weights = asked["weights"]
    teachers = [module for module in task.modules() if isinstance(module, FrozenTeacher)]
    of_file = weights not in (None, "default", "random")
    return {
        **asked,
        "weights_sha256": weights_digests(weights) if of_file else None,
        "draws": None if task.teacher_draws is None else count_draws(*task.teacher_draws),
        "networks_sha256": [weights_digest(teacher.network) for teacher in teachers],
    }
