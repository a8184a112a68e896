"""The first trace of a command in its run folder, left when its work begins: what fails before leaves none."""

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
    """A run folder as it was before a command.

    Args:
        folder: the run folder; it need not exist.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.record = _content(folder.record_file)
        self._missing = [path for path in (folder.path, *folder.path.parents) if not path.exists()]
        self._has_noise = folder.noise.is_file()
        self._kept = folder.path / ".before"

    def set_aside(self, paths: Iterable[Path]) -> None:
        """Keep these files for ``restore``, as the command is about to remove them."""
        if self._missing:
            return
        shutil.rmtree(self._kept, ignore_errors=True)  # of a command that was killed
        for path in paths:
            place = self._kept / path.relative_to(self.folder.path)
            place.parent.mkdir(parents=True, exist_ok=True)
            if path.is_file():
                _link(path, place)

    def forget(self) -> None:
        """Remove what was set aside."""
        shutil.rmtree(self._kept, ignore_errors=True)

    def restore(self) -> None:
        """Make the folder what it was."""
        if self._missing:
            shutil.rmtree(self.folder.path, ignore_errors=True)
            with suppress(OSError):  # another command may have put something there
                for path in self._missing[1:]:
                    path.rmdir()
            return
        if not self._has_noise:  # it would bind the next fit
            self.folder.noise.unlink(missing_ok=True)
        for path in [path for path in self._kept.rglob("*") if path.is_file()]:
            place = self.folder.path / path.relative_to(self._kept)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, place)
        self.forget()


class Beginning(L.Callback):
    """Writes ``run.json`` and ``config.yaml`` once training, or whatever the verb does, has begun.

    Args:
        before: the command's folder as it was.
        command: the command line for ``run.json``.
    """

    def __init__(self, before: FolderBefore, command: str) -> None:
        self.before = before
        self.command = command
        self._start = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self._waiting: list[tuple[RunFolder, str | None, int | None, str | None]] = []

    def add(self, folder: RunFolder, verb: str | None, seed: int | None, config: str | None = None) -> None:
        """Have ``run.json`` (unless ``verb`` is ``None``) and ``config.yaml`` written into one more folder."""
        self._waiting = [entry for entry in self._waiting if entry[1] != verb]  # a round that was done already
        self._waiting.append((folder, verb, seed, config))

    def begin(self, only: RunFolder | None = None, class_names: list[str] | None = None) -> None:
        """Write what waits, all or, when the command has ended, that of one folder; ``class_names`` are the data's."""
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
        """Whether the folder's record tells of this command; it may be another process that wrote it."""
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
        self._note(trainer)  # of a fit with nothing left to train, which may have an end to make up for

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
    except OSError:  # not every file system can
        shutil.copy2(source, target)
