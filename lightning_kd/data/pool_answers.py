"""The labels that answers give to the samples of a pool, and the settings by which a record recognises its pool."""

from __future__ import annotations

import hashlib
import warnings
from typing import Any

import numpy as np
import torch

from lightning_kd.core.run_callbacks import run_folder_of
from lightning_kd.data.pool_samples import PoolSamples
from lightning_kd.data.pool_split import PoolSplit
from lightning_kd.pool import UNKNOWN, PoolRecord
from lightning_kd.pool.pool_record import pool_file


def pool_settings(
    class_names: list[str],
    others: list[str],
    samples: PoolSamples,
    split: PoolSplit,
    own_target: np.ndarray,
    split_seed: int,
) -> dict[str, Any]:
    """The settings of a pool that must stay the same as long as a record of answers is in use.

    Args:
        class_names: names of the known classes.
        others: names of the source's other classes, which no new class may have.
        samples: the samples of the pool.
        split: the initial split of these samples.
        own_target: the source's own labels, int64 ``[N]``.
        split_seed: seed of the initial labels.
    """
    if samples.has_files:
        return {"classes": class_names, "others": others}  # samples are recognised by their file names
    if samples.path is not None:
        return {
            "classes": class_names,
            "others": others,
            "labelled": samples.own_count,
            "labelled_sha256": _sha256(own_target),
            "pool_sha256": _sha256(samples.image[samples.own_count :].numpy()),
        }
    return {
        "classes": class_names,
        "samples": len(split.universe),
        "initial": len(split.initial),
        "initial_sha256": _sha256(split.initial),
        "split_seed": split_seed,
    }


def record_of(trainer: Any, answers: str | None) -> PoolRecord | None:
    """The record that ``answers`` names, else that of the Trainer's run folder; ``None`` without both.

    Raises:
        FileNotFoundError: where ``answers`` names a file that does not exist.
    """
    if answers is not None:
        return PoolRecord.load(pool_file(answers))
    folder = run_folder_of(trainer)
    if folder is None or getattr(trainer, "fast_dev_run", False):
        return None
    return PoolRecord.load(folder.pool) if folder.pool.is_file() else PoolRecord(folder.pool)


def sampling_weights(record: PoolRecord, count: int) -> dict[str, torch.Tensor]:
    """``sampling_weight``, float32 ``[count]``, if the queries have loss weights; else an empty dict.

    The loss weights are divided by their mean over all queried samples; the weight of all other samples is 1.
    """
    rows = [row for row in record.queries if "loss_weight" in row]
    if not rows:
        return {}
    given = torch.tensor([row["loss_weight"] for row in rows], dtype=torch.float64)
    index = torch.tensor([row["index"] for row in rows])
    there = index >= 0  # negative: the file was removed
    weight = torch.ones(count, dtype=torch.float64)
    weight[index[there]] = (given / given.mean())[there]
    return {"sampling_weight": weight.float()}


def adopt_settings(record: PoolRecord, settings: dict[str, Any]) -> None:
    """Store the settings of the pool in ``record``, after a check against those stored before.

    Raises:
        ValueError: where the record belongs to another pool.
    """
    for name in settings.keys() & record.settings.keys():
        if (
            name == "classes"
            and record.settings[name][: len(settings[name])] == settings[name] != record.settings[name]
        ):
            added = record.settings[name][len(settings[name]) :]
            raise ValueError(
                f"{record.path} has the new classes {added}, which the data does not have: give OpenSetDataModule "
                f"new_classes={record.settings.get('new_classes', added)}"
            )
        if settings[name] != record.settings[name]:
            raise ValueError(
                f"{record.path} was begun with {name}={record.settings[name]}, got {settings[name]}: give the data "
                "settings of that run, or name another --run folder"
            )
    record.settings = {**record.settings, **settings}


def find_files(record: PoolRecord, samples: PoolSamples) -> None:
    """Update the positions in ``record`` to those of the files now, after files were added to the pool or removed.

    Earlier positions are kept in ``asked_as`` of the row, because the files of earlier queries name it by them.
    """
    place = {samples.path_of(i): i for i in range(samples.own_count, len(samples.image))}
    gone = [row for row in record.queries if row.get("path") not in place]
    for k, row in enumerate(record.queries):
        index = place.get(row.get("path"), -1 - k)
        if row["index"] >= 0 and row["index"] not in (index, *row.get("asked_as", [])):
            row["asked_as"] = [*row.get("asked_as", []), row["index"]]
        row["index"] = index
    if gone:
        warnings.warn(
            f"{len(gone)} queried images are no longer in {samples.path!r}, such as {gone[0].get('path')!r}: training "
            "continues without them",
            stacklevel=3,  # the caller of ``OpenSetDataModule.set_record``
        )


def answered_labels(
    record: PoolRecord, initial_label: np.ndarray, class_names: list[str], new_classes: list[str]
) -> np.ndarray:
    """The labels of the pool, int64 ``[N]``: ``initial_label`` changed by the answers in ``record``.

    Raises:
        ValueError: for an answer that is not a class or is for no sample, and for a new class without a sample.
    """
    number = {name: k for k, name in enumerate(class_names)} | {UNKNOWN: len(class_names)}
    label = initial_label.copy()
    answered = [(row["index"], number.get(row["answer"])) for row in record.queries if row["answer"] is not None]
    for index, answer in answered:
        if answer is None or index >= len(label):
            raise ValueError(
                f"{record.path} holds an answer for sample {index} that does not fit this pool: give that run's data"
            )
        if index >= 0:
            label[index] = answer
    for name in new_classes:
        if not (label == number[name]).any():
            raise ValueError(
                f"{record.path} has no sample of the new class {name!r} left: label one, with lightning-kd label "
                "--correct if it has another answer"
            )
    return label


def check_new_classes(new_classes: list[str], source_names: list[str], pool: str | None) -> None:
    """Raise a ``ValueError`` where ``new_classes`` cannot be added to the classes of the source."""
    if new_classes and pool is None:
        raise ValueError(
            f"new_classes are for a pool of your own, got {new_classes} without pool: name the known_classes instead"
        )
    for k, name in enumerate(new_classes):
        if name in source_names or name in new_classes[:k]:
            raise ValueError(f"new_classes holds {name!r}, which is a class already: leave it out")


def labels_digest(samples: PoolSamples, label: np.ndarray) -> str:
    """The sha256 of the known labels together with the positions or file names of their samples."""
    index = np.flatnonzero(label >= 0)
    if not samples.has_files:
        return _sha256(np.stack([index, label[index]]))
    own, added = index[index < samples.own_count], index[index >= samples.own_count]
    names = "\n".join(f"{samples.path_of(i)} {label[i]}" for i in added.tolist())
    return hashlib.sha256((_sha256(np.stack([own, label[own]])) + names).encode()).hexdigest()


def check_same_labels(same: bool, stage: str | None) -> None:
    """Check the labels that a checkpoint was trained on; ``same``: whether they are those that the pool has now.

    Raises:
        ValueError: where a fit would resume with other labels. A prediction only warns.
    """
    if stage == "fit" and not same:
        raise ValueError(
            "the checkpoint was trained on other labels than the pool has now: start the round anew with --overwrite "
            "instead of --ckpt_path (the answers are kept)"
        )
    if stage == "predict" and not same:
        warnings.warn("there are new answers since this checkpoint was trained: fit again first", stacklevel=3)


def _sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<")).tobytes()).hexdigest()
