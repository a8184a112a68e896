"""Writing the first files of a command into its run folder only when its work begins, so that an early error leaves
the folder unchanged."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import lightning as L

from lightning_kd.core.run_folder import RunFolder
from lightning_kd.file_writing import write_text

__all__ = ["Beginning", "FolderBefore"]


class FolderBefore:
    """The state of a run folder before a command, so that it can be restored.

    Args:
        folder: the run folder; it need not exist.

    Attributes:
        record: the content of ``run.json``, or ``None``.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.record = _content(folder.record_file)
        self._missing = [path for path in (folder.path, *folder.path.parents) if not path.exists()]
        self._has_noise = folder.noise.is_file()
        self._kept = folder.path / ".before"

    def set_aside(self, paths: Iterable[Path]) -> None:
        """Keep copies of these files, which the command is about to remove, for ``restore``."""
        if self._missing:
            return
        shutil.rmtree(self._kept, ignore_errors=True)  # those of a command that was killed
        for path in paths:
            place = self._kept / path.relative_to(self.folder.path)
            place.parent.mkdir(parents=True, exist_ok=True)
            if path.is_file():
                _link(path, place)

    def forget(self) -> None:
        """Remove the copies of ``set_aside``."""
        shutil.rmtree(self._kept, ignore_errors=True)

    def restore(self) -> None:
        """Restore the folder to its state before the command.

        Raises:
            OSError: if a file cannot be put back; those set aside stay where they are.
        """
        if self._missing:
            shutil.rmtree(self.folder.path, ignore_errors=True)
            with suppress(OSError):  # another command may have written something there
                for path in self._missing[1:]:
                    path.rmdir()
            return
        try:
            for path in [path for path in self._kept.rglob("*") if path.is_file()]:
                place = self.folder.path / path.relative_to(self._kept)
                place.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, place)
        except OSError as error:
            raise OSError(
                f"not all files of the earlier run could be put back into {self.folder.path} ({error}): the others are "
                f"in {self._kept}, move them into {self.folder.path} before the next command there, which removes them"
            ) from error
        self.forget()
        if not self._has_noise:  # otherwise the next fit would have to use this noise
            self.folder.noise.unlink(missing_ok=True)


class Beginning(L.Callback):
    """Writes ``run.json`` and ``config.yaml`` when training, or another work of the verb, begins.

    Args:
        before: the state of the run folder before the command.
        command: the command line, for ``run.json``.
    """

    def __init__(self, before: FolderBefore, command: str) -> None:
        self.before = before
        self.command = command
        self._start = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self._waiting: list[tuple[RunFolder, str | None, int | None, str | None]] = []

    def add(self, folder: RunFolder, verb: str | None, seed: int | None, config: str | None = None) -> None:
        """Register a folder for ``begin``, which writes ``run.json`` (unless ``verb`` is ``None``) and ``config.yaml``.

        Args:
            folder: the run folder.
            verb: see ``RunFolder.begin``.
            seed: see ``RunFolder.begin``.
            config: the text of ``config.yaml``; ``None``: it is not written.
        """
        self._waiting = [entry for entry in self._waiting if entry[1] != verb]  # a round that needed no training
        self._waiting.append((folder, verb, seed, config))

    def begin(self, only: RunFolder | None = None, class_names: list[str] | None = None) -> None:
        """Write the files of all registered folders.

        Args:
            only: at the end of a command: write those of this folder alone, with the start time of the command.
            class_names: names of the data's classes.
        """
        waiting, self._waiting = self._waiting, []
        for folder, verb, seed, config in waiting:
            if only is not None and folder is not only:
                continue
            if verb is not None:
                folder.begin(verb, self.command, seed, class_names)
                if only is not None:
                    folder.record["start"] = self._start
            if config is not None:
                write_text(folder.path / "config.yaml", config)
        self.before.forget()

    def has_begun(self) -> bool:
        """Whether the folder's ``run.json`` is of this command, written by this or another process."""
        folder = self.before.folder
        content = _content(folder.record_file)
        if folder.record or content is None or content == self.before.record:
            return bool(folder.record)
        record = json.loads(content)
        if record["command"] != self.command:
            return False
        folder.record = record
        return True

    def _note(self, trainer: L.Trainer) -> None:
        if trainer.is_global_zero:
            names = getattr(trainer.datamodule, "class_names", None)  # type: ignore[attr-defined]
            self.begin(class_names=None if names is None else [*map(str, names)])

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._note(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._note(trainer)  # a fit with no epochs left, which may still write its results

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._note(trainer)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._note(trainer)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._note(trainer)


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _link(source: Any, target: Any) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)
