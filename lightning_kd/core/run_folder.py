"""The run folder: everything that a command writes, in one folder without version numbers.

``config.yaml``, ``run.json``, ``metrics.csv``, ``checkpoints/last.ckpt`` and ``best.ckpt``, exported networks,
``predictions.csv``, and what a family adds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from contextlib import AbstractContextManager, suppress
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightning_kd import __version__
from lightning_kd.file_writing import alone, remove_leftovers, write_text

__all__ = ["RunFolder", "remove_files"]

# files of earlier runs that a new fit removes, besides those that run.json lists
_WRITTEN = [
    *("checkpoints/last.ckpt", "checkpoints/best.ckpt", "checkpoints/shifted.ckpt", "network.pt", "student.pt"),
    *("exported.onnx", "exported.torchscript", "exported.pt"),
    *("metrics.csv", "predictions.csv", "predictions.html", "predictions.png", "predictions/[0-9]*.png"),
    *("noisy_labels.csv", "noisy_labels.html", "wrong_labels.csv", "pseudo_labels.csv", "noise.npz"),
    *("shifts.json", "shift.json", "sharpness.json", "traceback.txt", "confusion.csv", "confusion.png"),
    *(f"pictures/{name}{end}.png" for name in ("label_scores", "reliability") for end in ("", "_epoch[0-9]*")),
    *("pictures/loss_slice_*.png", "pictures/loss_slice_*.npz"),
]


class RunFolder:
    """Paths of one run and its ``run.json``.

    Args:
        path: the folder; it is created when something is written.

    Attributes:
        record: the content of ``run.json`` as this command writes it; empty before ``begin``.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.last = self.path / "checkpoints" / "last.ckpt"
        self.best = self.path / "checkpoints" / "best.ckpt"
        self.metrics = self.path / "metrics.csv"
        self.noise = self.path / "noise.npz"
        self.pool = self.path / "pool.json"
        self.record_file = self.path / "run.json"
        self.record: dict[str, Any] = {}

    def checkpoint(self, name: str) -> Path:
        """The path of the checkpoint ``"last"`` or ``"best"``.

        Raises:
            FileNotFoundError: if it does not exist.
        """
        path = {"last": self.last, "best": self.best}[name]
        if not path.is_file():
            raise FileNotFoundError(
                f"ckpt_path {name!r}: there is no {path}; name the folder of an earlier fit with --run, or, to begin "
                "a fit, leave --ckpt_path out"
            )
        return path

    def fit_is_finished(self) -> bool:
        """Whether the latest fit in the folder is recorded as finished in ``run.json``."""
        try:
            record = json.loads(self.record_file.read_text(encoding="utf-8"))
            fits = [entry for entry in [*record["history"], record] if entry["verb"] in ("fit", "active")]
            return bool(fits) and fits[-1]["outcome"] == "finished"
        except (OSError, ValueError, KeyError, TypeError):  # no run.json, or a damaged one
            return False

    def alone(self) -> AbstractContextManager[None]:
        """A lock on the folder against other commands.

        Raises:
            ValueError: if another command holds it.
            OSError: if the folder cannot be written.
        """
        refusal = f"another command works in {self.path}: wait until it has ended, or name another --run folder"
        return alone(self.path / ".run.lock", refusal)

    def can_be_written(self) -> bool:
        """Whether files can be created in the folder, or the folder itself if it does not exist."""
        there = next(path for path in (self.path, *self.path.absolute().parents) if path.exists())
        return os.access(there, os.W_OK | os.X_OK)

    def written(self) -> list[Path]:
        """The files of an earlier run: checkpoints, exported networks, metrics, predictions, reports; no other files.

        Raises:
            ValueError: if ``run.json`` is damaged, or not of lightning-kd.
        """
        found = [path for pattern in _WRITTEN for path in self.path.glob(pattern)]
        # predicted masks have a number as their name
        found = [path for path in found if path.parent.name != "predictions" or path.stem.isdecimal()]
        listed = [Path(name) for name in (self.read_record() or {}).get("files", [])]
        found += [self.path / name for name in listed if not name.is_absolute() and ".." not in name.parts]
        return [path for path in dict.fromkeys(found) if path.is_file() or path.is_symlink()]

    def check_is_run(self) -> None:
        """Check, before its files are removed, that this is a run folder.

        Raises:
            FileExistsError: if it holds files that would be removed, but no ``run.json``.
            ValueError: see ``written``.
        """
        found = [str(path.relative_to(self.path)) for path in self.written() if path != self.noise]
        if found and self.read_record() is None:
            raise FileExistsError(
                f"{self.path} holds {', '.join(found)} but no run.json, so no run may have written them: "
                "--overwrite removes only what a run wrote; move them elsewhere, or name another --run folder"
            )

    def clear(self) -> None:
        """Remove the files of an earlier run, see ``written``."""
        remove_files(self.path, self.written())

    def read_record(self) -> dict[str, Any] | None:
        """The content of ``run.json``, or ``None`` if there is no such file.

        Raises:
            ValueError: if it is damaged, or not of lightning-kd.
        """
        if not self.record_file.is_file():
            return None
        try:
            found = json.loads(self.record_file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{self.record_file} is damaged ({error}): remove it, the run works without") from error
        if not isinstance(found, dict) or not {"verb", "outcome"} <= found.keys():
            raise ValueError(f"{self.record_file} is not of a run of lightning-kd: name another --run folder")
        return found

    def begin(self, verb: str, command: str, seed: int | None, class_names: list[str] | None = None) -> None:
        """Write ``run.json`` with outcome ``running``; earlier commands move to its ``history``.

        Args:
            verb: the command, such as ``"fit"``.
            command: the whole command line.
            seed: the seed of ``seed_everything``.
            class_names: names of the data's classes, in the order of their numbers; ``None`` if they have none.

        Raises:
            NotADirectoryError: if the folder is a file.
            ValueError: if an earlier ``run.json`` is damaged.
        """
        if self.path.exists() and not self.path.is_dir():
            raise NotADirectoryError(f"--run {str(self.path)!r} is a file: name a folder")
        earlier = self.read_record() or {}
        history = earlier.pop("history", [])
        files = [name for name in earlier.pop("files", []) if (self.path / name).is_file()]
        packages = ("torch", "torchvision", "lightning", "torchmetrics", "numpy")
        record = {
            "verb": verb,
            "command": command,
            "seed": seed,
            "class_names": class_names,
            "versions": {"lightning-kd": __version__, **{name: version(name) for name in packages}},
            "start": _now(),
            "end": None,
            "outcome": "running",
            "files": files,
            "history": [*history, earlier] if earlier else history,
        }
        self._write_record(record)
        self.record = record

    def note_files(self, paths: Iterable[str | Path]) -> None:
        """Add files that the run wrote to the list in ``run.json``, so that a later fit can remove them."""
        if not self.record or not self.record_file.is_file():  # not run by a command, or the file was removed
            return
        home = self.path.absolute()
        names = [str(path.relative_to(home)) for path in map(Path.absolute, map(Path, paths)) if home in path.parents]
        files = sorted({*self.record["files"], *names})
        if files != self.record["files"]:
            self.record["files"] = files
            with suppress(OSError):  # end() writes it again
                self._write_record(self.record)

    def end(self, outcome: str, **details: Any) -> None:
        """Write the outcome (``finished``, ``failed`` or ``interrupted``), the time and ``details`` to ``run.json``."""
        self.record.update(end=_now(), outcome=outcome, **details)
        self._write_record(self.record)

    def _write_record(self, record: dict[str, Any]) -> None:
        write_text(self.record_file, json.dumps(record, indent=2) + "\n")


def remove_files(folder: Path, paths: Iterable[Path]) -> None:
    """Remove files below ``folder``, and the folders below it that are empty afterwards."""
    paths = list(paths)
    for path in paths:
        path.unlink(missing_ok=True)
    parents = {parent for path in paths for parent in path.parents if folder in parent.parents}
    for parent in sorted(parents, key=lambda parent: len(parent.parts), reverse=True):
        remove_leftovers(parent)
        with suppress(OSError):  # it holds other files
            parent.rmdir()


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
