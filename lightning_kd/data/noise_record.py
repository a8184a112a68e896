"""Keeps the given labels of a run in its folder, so that a resumed run, and other methods, train on the same labels."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np

from lightning_kd.core.run_folder import RunFolder
from lightning_kd.data.array_files import check_keys, read_arrays, write_npz
from lightning_kd.data.label_noise import CleanLabels, DrawnLabels


def load_or_draw_labels(
    noise: DrawnLabels, clean: CleanLabels, folder: RunFolder | None, trainer: L.Trainer | None
) -> np.ndarray:
    """The given labels: read from the run folder if they are recorded there, else drawn and recorded.

    A record is used if the folder also holds a checkpoint, or if the run is evaluated; else a fit draws new labels. If
    the labels come from a file or an array, they must still equal the record. Labels drawn from numbers only are not
    compared, so a record stays valid even if a later version of this package draws them differently. Process 0 does all
    this and broadcasts the result.

    Args:
        noise: draws the labels.
        clean: the data set.
        folder: the run folder; ``None`` to keep no record.
        trainer: the Trainer whose processes share the labels; ``None`` for a single process.

    Returns:
        what ``noise.corrupt`` returns, the same in every process.

    Raises:
        ValueError: where the folder holds a checkpoint trained on other labels, and as ``noise`` raises.
    """
    fitting = trainer is None or trainer.state.fn == "fit"
    if trainer is None or trainer.world_size == 1:
        return _recorded_or_drawn(noise, clean, folder, fitting)
    labels: np.ndarray | Exception | None = None
    if trainer.global_rank == 0:
        try:
            labels = _recorded_or_drawn(noise, clean, folder, fitting)
        except Exception as error:  # broadcast too: the other processes would wait for labels forever
            labels = error
    labels = trainer.strategy.broadcast(labels)
    if isinstance(labels, Exception):
        raise labels
    assert labels is not None
    return labels


def check_no_noise(folder: RunFolder | None, trainer: L.Trainer | None) -> None:
    """Before a fit on the data set's own labels: delete the record of given labels, unless a checkpoint needs it.

    Raises:
        ValueError: where the folder holds a checkpoint that was trained on the recorded labels.
    """
    if folder is None or not folder.noise.is_file():
        return
    if folder.last.is_file():
        raise ValueError(
            f"noise=None would train on clean labels, but {folder.path} holds a checkpoint trained on others: give the "
            "noise or the candidates of that run, or name another --run folder"
        )
    if trainer is None or trainer.global_rank == 0:
        folder.noise.unlink(missing_ok=True)


def digest(given: np.ndarray) -> str:
    """The sha256, in hexadecimal, of labels of any shape, as little-endian int64."""
    found, flat = hashlib.sha256(), given.reshape(-1)
    for start in range(0, len(flat), 1 << 20):
        found.update(flat[start : start + (1 << 20)].astype("<i8").tobytes())
    return found.hexdigest()


def _recorded_or_drawn(noise: DrawnLabels, clean: CleanLabels, folder: RunFolder | None, fitting: bool) -> np.ndarray:
    trained = folder is not None and folder.last.is_file()
    recorded = folder is not None and folder.noise.is_file()
    if folder is not None and recorded and (trained or not fitting):
        record = _read(folder.noise)
        reason = _reason_to_refuse(record, noise, clean, fitting)
        if reason is None:
            return record["given"]
        if trained:
            raise ValueError(
                f"{folder.noise} belongs to the checkpoint in that folder, but {reason}: give the data and noise of "
                "that run, add --overwrite to start anew, or name another --run folder"
            )
    given = _draw(noise, clean)
    if folder is not None and (fitting or not (trained or recorded)):
        _write(folder.noise, noise, clean.target, given)
    return given


def _draw(noise: DrawnLabels, clean: CleanLabels) -> np.ndarray:
    return noise.corrupt(clean.target, clean.class_names, clean.image, clean.file)


def _read(path: Path) -> dict[str, np.ndarray]:
    arrays = read_arrays(path, "")
    check_keys(arrays, ["given", "clean", "generator", "sha256"], repr(str(path)))
    return arrays


def _reason_to_refuse(
    record: dict[str, np.ndarray], noise: DrawnLabels, clean: CleanLabels, fitting: bool
) -> str | None:
    """Why the recorded labels may not be used; ``None`` if they may."""
    if str(record["sha256"]) != digest(record["given"]):
        return "its labels do not match its sha256"
    if not np.array_equal(record["clean"], clean.target):
        return "its clean labels are not those of the data set"
    same_text = str(record["generator"]) == repr(noise)
    if same_text and (not fitting or _repr_is_complete(noise)):
        return None
    if str(record["sha256"]) == digest(_draw(noise, clean)):
        return None
    if same_text:
        return f"its labels are no longer those of {noise}"
    return f"was drawn by {record['generator']}, not by {noise}"


def _repr_is_complete(noise: DrawnLabels) -> bool:
    """Whether ``repr(noise)`` determines the labels: it reads no file and holds no array."""
    return noise.without_files() is noise and all(_is_plain(value) for value in vars(noise).values())


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, str | int | float)


def _write(path: Path, noise: DrawnLabels, clean: np.ndarray, given: np.ndarray) -> None:
    values: dict[str, Any] = {
        "given": given,
        "clean": clean,
        "generator": repr(noise),
        "rate": noise.nominal_rate,
        "seed": getattr(noise, "seed", 0),
        "sha256": digest(given),
    }
    write_npz(path, {name: np.asarray(value) for name, value in values.items()})
