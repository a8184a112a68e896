"""Checkpoints on disk: written whole or not at all, and checked when they are read."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lightning_kd.file_writing import written_whole

__all__ = ["RunCheckpointIO", "check_checksums", "read_checkpoint"]


class RunCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and then puts it there, so that a kill or a full disk leaves the old one.

    Lightning's own writes into ``$TMPDIR`` and moves, which is a copy over the old file where that is another file
    system. Checkpoints are read with ``weights_only=True`` unless told otherwise, after a look at their checksums.
    Addresses such as ``s3://`` are left to Lightning.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        # into an open file: given a name, torch would put it into the content
        with written_whole(Path(path), durable=True) as part, part.open("wb") as file:
            torch.save(checkpoint, file)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        if "://" in str(path):
            return super().load_checkpoint(path, map_location, weights_only)
        return read_checkpoint(path, map_location or "cpu", weights_only is not False)


def check_checksums(path: Path) -> None:
    """Read a file of ``torch.save`` through once: torch itself does not look at the checksums in it.

    Raises:
        ValueError: where one is wrong.
        zipfile.BadZipFile: where the file is damaged elsewhere.
    """
    if zipfile.is_zipfile(path):  # files of torch before 1.6 are none, and have no checksums
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"the checksum of {damaged} is wrong")


def read_checkpoint(path: str | Path, map_location: Any = "cpu", weights_only: bool = True) -> dict[str, Any]:
    """The content of a checkpoint. Nothing but tensors and plain values is unpickled.

    Args:
        path: the file.
        map_location: where its tensors go, see ``torch.load``.
        weights_only: turned off, whatever the file says is run: only for one that you have made yourself.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: where it is damaged (each part of it has a checksum), no checkpoint, or holds other objects.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"ckpt_path {path}: there is no such file; give last, best or the path of a checkpoint")
    remedy = "give another checkpoint, such as best, or start anew with --overwrite"
    try:
        check_checksums(path)
        content = torch.load(path, map_location=map_location, weights_only=weights_only)
    except PermissionError:
        raise
    except pickle.UnpicklingError as error:
        objects = zipfile.is_zipfile(path)
        reason = "is damaged, or no checkpoint"
        if objects:
            reason = "holds objects other than tensors and plain values"
            remedy = "give another one or, of a file that is your own, call trainer.fit(..., weights_only=False)"
        raise ValueError(f"{path} {reason}: {remedy}") from error
    except Exception as error:  # damaged files raise anything from KeyError to struct.error
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        reason = "" if "weights_only" in reason else f" ({reason})"  # torch's advice is to trust the file
        raise ValueError(f"{path} is damaged, or no checkpoint{reason}: {remedy}") from error
    if not isinstance(content, dict) or "state_dict" not in content:
        raise ValueError(f"ckpt_path {path} holds no state_dict: give a checkpoint of lightning-kd fit")
    return content
