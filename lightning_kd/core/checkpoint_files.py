"""Checkpoint files: replaced only when completely written, and checked when they are read."""

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
    """Writes a checkpoint into a temporary file in the same folder and then renames it.

    If the process is killed or the disk is full, the old checkpoint is still there. (Lightning writes into ``$TMPDIR``;
    if that is on another file system, moving the file copies it over the old one.) Checkpoints are read with
    ``weights_only=True`` by default, after checking their checksums. URLs such as ``s3://`` are left to Lightning.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        # into an open file: given a path, torch stores the name of the temporary file in it
        with written_whole(Path(path), durable=True) as part, part.open("wb") as file:
            torch.save(checkpoint, file)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        if "://" in str(path):
            return super().load_checkpoint(path, map_location, weights_only)
        return read_checkpoint(path, map_location or "cpu", weights_only is not False)


def check_checksums(path: Path) -> None:
    """Verify the checksums in a file of ``torch.save``, which torch itself does not.

    Raises:
        ValueError: if one is wrong.
        zipfile.BadZipFile: if the file is damaged in another way.
    """
    if zipfile.is_zipfile(path):  # files of torch before 1.6 are no zip files and have no checksums
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"the checksum of {damaged} is wrong")


def read_checkpoint(path: str | Path, map_location: Any = "cpu", weights_only: bool = True) -> dict[str, Any]:
    """The content of a checkpoint; by default nothing but tensors and plain values is unpickled.

    Args:
        path: the file.
        map_location: device of its tensors, see ``torch.load``.
        weights_only: False also unpickles other objects, which can run any code: only for files that you trust.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged (its checksums are verified), is no checkpoint, or holds other objects.
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
