"""The labels that a record of answers gives to a pool, and what tells one pool and its labels from another."""

from __future__ import annotations

import hashlib
import warnings
from typing import Any

import numpy as np

from lightning_kd.data.pool_samples import PoolSamples
from lightning_kd.data.pool_split import UNLABELLED, PoolSplit
from lightning_kd.pool import UNKNOWN, PoolRecord


def pool_settings(
    class_names: list[str], samples: PoolSamples, split: PoolSplit, own_target: np.ndarray, split_seed: int
) -> dict[str, Any]:
    """What must not change as long as a record is in use; ``own_target`` are the source's own labels."""
    if samples.has_files:
        return {"classes": class_names}  # answers are found by the names of files
    if samples.path is not None:
        return {
            "classes": class_names,
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


def adopt_settings(record: PoolRecord, settings: dict[str, Any]) -> None:
    """Note the settings of the pool that ``record`` is used with.

    Raises:
        ValueError: where it is the record of another pool.
    """
    for name in settings.keys() & record.settings.keys():
        if settings[name] != record.settings[name]:
            raise ValueError(
                f"{record.path} was begun with {name}={record.settings[name]}, got {settings[name]}: keep the data "
                "settings of that run, or name another --run folder"
            )
    record.settings = {**record.settings, **settings}


def find_files(record: PoolRecord, samples: PoolSamples) -> None:
    """Bring the positions in ``record`` to where the files of its rows are now: some may have come or gone."""
    place = {samples.path_of(i): i for i in range(samples.own_count, len(samples.image))}
    gone = [row for row in record.queries if row.get("path") not in place]
    for row in record.queries:
        row["index"] = place.get(row.get("path"), UNLABELLED)
    if gone:
        warnings.warn(
            f"{len(gone)} images asked for are no longer in {samples.path!r}, such as "
            f"{gone[0].get('path')!r}: training goes on without them",
            stacklevel=3,  # the caller of ``OpenSetDataModule.use``
        )


def answered_labels(record: PoolRecord, initial_label: np.ndarray, class_names: list[str]) -> np.ndarray:
    """The initial labels ``[N]`` with the answers of ``record``, and none else.

    Raises:
        ValueError: for an answer that is no class, or of no sample.
    """
    number = {name: k for k, name in enumerate(class_names)} | {UNKNOWN: len(class_names)}
    label = initial_label.copy()
    answered = [(row["index"], number.get(row["answer"])) for row in record.queries if row["answer"] is not None]
    for index, answer in answered:
        if answer is None or index >= len(label):
            raise ValueError(f"{record.path} holds an answer for sample {index} that does not fit this pool")
        if index >= 0:
            label[index] = answer
    return label


def labels_digest(samples: PoolSamples, label: np.ndarray) -> str:
    """The sha256 of the labels that there are, and of what they belong to."""
    index = np.flatnonzero(label >= 0)
    if not samples.has_files:
        return _sha256(np.stack([index, label[index]]))
    own, added = index[index < samples.own_count], index[index >= samples.own_count]
    names = "\n".join(f"{samples.path_of(i)} {label[i]}" for i in added.tolist())
    return hashlib.sha256((_sha256(np.stack([own, label[own]])) + names).encode()).hexdigest()


def _sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<")).tobytes()).hexdigest()
