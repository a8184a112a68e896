"""The given labels of a run, kept in its folder so that a resumed run, and other methods, train on the same ones."""

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
    """The given labels: those recorded in ``folder`` where it holds a checkpoint that was trained on them, or where
    they are evaluated on; else drawn and, in a folder, recorded.

    The labels that a file or an array holds now must be the recorded ones. Labels that are made up by numbers alone are
    not compared: the record stays, should they be drawn otherwise some day. The first process does all this and tells
    the others.

    Args:
        noise: what draws them.
        clean: the data set.
        folder: the run folder; ``None`` for no record.
        trainer: of the processes; ``None`` for one alone.

    Returns:
        as ``noise.corrupt`` gives them, the same ones in every process.

    Raises:
        ValueError: where the folder holds a checkpoint of a run with other labels, and what ``noise`` raises.
    """
    fitting = trainer is None or trainer.state.fn == "fit"
    if trainer is None or trainer.world_size == 1:
        return _settle(noise, clean, folder, fitting)
    answer: np.ndarray | Exception | None = None
    if trainer.global_rank == 0:
        try:
            answer = _settle(noise, clean, folder, fitting)
        except Exception as error:  # told to the others, who would wait for ever
            answer = error
    answer = trainer.strategy.broadcast(answer)
    if isinstance(answer, Exception):
        raise answer
    assert answer is not None
    return answer


def check_no_noise(folder: RunFolder | None, trainer: L.Trainer | None) -> None:
    """Before a fit on the data set's own labels: remove a record that no checkpoint needs.

    Raises:
        ValueError: where the folder holds a checkpoint that was trained on recorded labels.
    """
    if folder is None or not folder.noise.is_file():
        return
    if folder.last.is_file():
        raise ValueError(
            f"noise=None would train on clean labels, and {folder.path} holds a checkpoint of other ones: "
            "give the noise or the candidates of that run, or name another --run folder"
        )
    if trainer is None or trainer.global_rank == 0:
        folder.noise.unlink(missing_ok=True)


def digest(given: np.ndarray) -> str:
    """The sha256 of labels of any shape as little-endian int64, in hexadecimal."""
    found, flat = hashlib.sha256(), given.reshape(-1)
    for start in range(0, len(flat), 1 << 20):
        found.update(flat[start : start + (1 << 20)].astype("<i8").tobytes())
    return found.hexdigest()


def _settle(noise: DrawnLabels, clean: CleanLabels, folder: RunFolder | None, fitting: bool) -> np.ndarray:
    trained = folder is not None and folder.last.is_file()
    recorded = folder is not None and folder.noise.is_file()
    if folder is not None and recorded and (trained or not fitting):
        record = _read(folder.noise)
        reason = _objection(record, noise, clean, fitting)
        if reason is None:
            return record["given"]
        if trained:
            raise ValueError(
                f"{folder.noise} belongs to the checkpoint in that folder, but {reason}: go on with the data and noise "
                "of that run, add --overwrite to start anew, or name another --run folder"
            )
    given = _draw(noise, clean)
    if folder is not None and (fitting or not (trained or recorded)):
        _write(folder.noise, noise, clean.target, given)
    return given


def _draw(noise: DrawnLabels, clean: CleanLabels) -> np.ndarray:
    return noise.corrupt(clean.target, clean.class_names, clean.image, clean.file)


def _read(path: Path) -> dict[str, np.ndarray]:
    arrays = read_arrays(path)
    check_keys(arrays, ["given", "clean", "generator", "sha256"], repr(str(path)))
    return arrays


def _objection(record: dict[str, np.ndarray], noise: DrawnLabels, clean: CleanLabels, fitting: bool) -> str | None:
    """Why the recorded labels are not those to go on with; ``None`` where they are."""
    if str(record["sha256"]) != digest(record["given"]):
        return "its labels do not match its sha256"
    if not np.array_equal(record["clean"], clean.target):
        return "its clean labels are not those of the data set"
    same_text = str(record["generator"]) == repr(noise)
    if same_text and (not fitting or _is_made_up(noise)):
        return None
    if str(record["sha256"]) == digest(_draw(noise, clean)):
        return None
    if same_text:
        return f"its labels are no longer those of {noise}"
    return f"was drawn by {record['generator']}, not by {noise}"


def _is_made_up(noise: DrawnLabels) -> bool:
    """Whether the text of a noise says all about it: it reads no file and holds no array, which a text cuts short."""
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
