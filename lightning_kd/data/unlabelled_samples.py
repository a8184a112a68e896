"""Reads unlabelled samples for a labelled data set, without those that the data set contains already."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_kd.core.notes import note
from lightning_kd.data.new_samples import files_to_predict, read_unlabelled

__all__ = ["further_samples"]


def further_samples(path: str, train: Any, held_out: Sequence[Any]) -> Any:
    """The samples of ``path`` that the labelled data set does not contain.

    Arrays are compared by content. Files are left out if they are files of the labelled data set, or if their content
    equals that of a validation or test file.

    Args:
        path: a folder, an image or a list (see ``files_to_predict``) where samples are files, else an array file.
        train: the training samples ``[N, ...]``, or their files.
        held_out: the validation and the test samples, or their files.

    Returns:
        samples of the same kind as ``train``.

    Raises:
        FileNotFoundError: where ``path`` does not exist.
        ValueError: where it holds samples of another shape or dtype, or no new sample.
    """
    if isinstance(train, list):
        own = {os.path.realpath(file) for files in (train, *held_out) for file in files}
        found: Any = files_to_predict(path, "unlabelled")
        kept: Any = [file for file in found if os.path.realpath(file) not in own]
        copies = _copies(kept, [file for files in held_out for file in files])
        kept = [file for file in kept if file not in copies]
    else:
        found = read_unlabelled(path, "unlabelled")
        if found.shape[1:] != train.shape[1:] or found.dtype != train.dtype:
            raise ValueError(
                f"samples of unlabelled {path!r} must be like the labelled ones {tuple(train.shape[1:])}, got "
                f"{tuple(found.shape[1:])}: give both in one shape and dtype"
            )
        known = {row for samples in (train, *held_out) for row in _rows(samples)}
        kept = found[torch.tensor([row not in known for row in _rows(found)])]
    if not len(kept):
        raise ValueError(
            f"unlabelled {path!r} holds only samples that the labelled data has: give others, or leave it out"
        )
    if len(kept) < len(found):
        note(
            f"unlabelled: {len(found) - len(kept)} of {len(found)} samples are also in the training, validation or "
            "test data, and are left out"
        )
    return kept


def _rows(samples: Tensor) -> Iterable[bytes]:
    """A digest of each sample."""
    for row in samples.flatten(1).contiguous().numpy():
        yield hashlib.blake2b(row.tobytes(), digest_size=16).digest()


def _copies(files: Sequence[str], originals: Sequence[str]) -> set[str]:
    """The ``files`` whose content equals that of an original; most are ruled out by size or last bytes."""
    key: Callable[[str], Any]
    for key in (_size, _end, _digest):
        there = {key(file) for file in originals}
        files = [file for file in files if key(file) in there]
        left = {key(file) for file in files}
        originals = [file for file in originals if key(file) in left]
    return {*files}


def _size(path: str) -> int:
    return os.path.getsize(path)


def _end(path: str) -> bytes:
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - 4096))
        return file.read()


def _digest(path: str) -> bytes:
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            found.update(part)
    return found.digest()
