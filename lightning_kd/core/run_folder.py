"""The run folder: everything a command leaves behind, in one place without version numbers.

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

# what runs write and a fit begins without, beside what their run.json lists as files
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
        path: the folder; made when something is written.
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
        """The path of ``last`` or ``best``.

        Raises:
            FileNotFoundError: where it does not exist yet.
        """
        path = {"last": self.last, "best": self.best}[name]
        if not path.is_file():
            raise FileNotFoundError(
                f"ckpt_path {name!r}: there is no {path}; leave --ckpt_path out to start anew, or name the folder of "
                "an earlier fit with --run"
            )
        return path

    def fit_is_finished(self) -> bool:
        """Whether ``run.json`` says that the latest fit in the folder came to its end."""
        try:
            record = json.loads(self.record_file.read_text(encoding="utf-8"))
            fits = [entry for entry in [*record["history"], record] if entry["verb"] in ("fit", "active")]
            return bool(fits) and fits[-1]["outcome"] == "finished"
        except (OSError, ValueError, KeyError, TypeError):  # there is none, or it is damaged
            return False

    def alone(self) -> AbstractContextManager[None]:
        """Keep other commands out of the folder.

        Raises:
            ValueError: where another one works in it.
            OSError: where it may not be written.
        """
        refusal = f"another command works in {self.path}: wait until it has ended, or name another --run folder"
        return alone(self.path / ".run.lock", refusal)

    def can_be_written(self) -> bool:
        """Whether files can be made in it, or itself where it is missing."""
        there = next(path for path in (self.path, *self.path.absolute().parents) if path.exists())
        return os.access(there, os.W_OK | os.X_OK)

    def written(self) -> list[Path]:
        """What an earlier fit left: checkpoints, exported networks, metrics, predictions, reports; nobody else's files.

        Raises:
            ValueError: where ``run.json`` is none of ours, or damaged.
        """
        found = [path for pattern in _WRITTEN for path in self.path.glob(pattern)]
        found = [path for path in found if path.parent.name != "predictions" or path.stem.isdecimal()]  # masks
        listed = [Path(name) for name in (self.read_record() or {}).get("files", [])]
        found += [self.path / name for name in listed if not name.is_absolute() and ".." not in name.parts]
        return [path for path in dict.fromkeys(found) if path.is_file() or path.is_symlink()]

    def check_is_run(self) -> None:
        """Before an earlier fit is removed.

        Raises:
            FileExistsError: where no ``run.json`` tells that what would be removed is of a run.
            ValueError: as ``written``.
        """
        found = [str(path.relative_to(self.path)) for path in self.written() if path != self.noise]
        if found and self.read_record() is None:
            raise FileExistsError(
                f"{self.path} holds {', '.join(found)} but no run.json, so that they may be somebody's own: "
                "--overwrite removes only what a run wrote; move them elsewhere, or name another --run folder"
            )

    def clear(self) -> None:
        """Remove what an earlier fit left, see ``written``."""
        remove_files(self.path, self.written())

    def read_record(self) -> dict[str, Any] | None:
        """What ``run.json`` holds; ``None`` where there is none.

        Raises:
            ValueError: where it is damaged, or none of ours.
        """
        if not self.record_file.is_file():
            return None
        try:
            found = json.loads(self.record_file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{self.record_file} is damaged ({error}): remove it, the run needs it no more") from error
        if not isinstance(found, dict) or not {"verb", "outcome"} <= found.keys():
            raise ValueError(f"{self.record_file} is of no run of lightning-kd: name another --run folder")
        return found

    def begin(self, verb: str, command: str, seed: int | None, class_names: list[str] | None = None) -> None:
        """Write ``run.json`` with outcome ``running``; earlier commands move to its ``history``.

        Args:
            verb: what the command does.
            command: the command line.
            seed: of ``seed_everything``.
            class_names: of the data, in the order of their numbers; ``None`` where it has none.

        Raises:
            NotADirectoryError: where the folder is a file.
            ValueError: where an earlier ``run.json`` is damaged.
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
        """List further files that the run wrote in ``run.json``, so that a later fit can remove them."""
        if not self.record or not self.record_file.is_file():  # no command's, or removed by somebody
            return
        home = self.path.absolute()
        names = [str(path.relative_to(home)) for path in map(Path.absolute, map(Path, paths)) if home in path.parents]
        files = sorted({*self.record["files"], *names})
        if files != self.record["files"]:
            self.record["files"] = files
            with suppress(OSError):  # the end of the command tries again
                self._write_record(self.record)

    def end(self, outcome: str, **details: Any) -> None:
        """Note the outcome (``finished``, ``failed`` or ``interrupted``) and what was reached."""
        self.record.update(end=_now(), outcome=outcome, **details)
        self._write_record(self.record)

    def _write_record(self, record: dict[str, Any]) -> None:
        write_text(self.record_file, json.dumps(record, indent=2) + "\n")


def remove_files(folder: Path, paths: Iterable[Path]) -> None:
    """Remove files below ``folder``, and the folders between that are empty then."""
    paths = list(paths)
    for path in paths:
        path.unlink(missing_ok=True)
    parents = {parent for path in paths for parent in path.parents if folder in parent.parents}
    for parent in sorted(parents, key=lambda parent: len(parent.parts), reverse=True):
        remove_leftovers(parent)
        with suppress(OSError):  # it holds somebody's own files
            parent.rmdir()


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
