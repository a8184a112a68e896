"""The run folder: everything a command leaves behind, in one place without version numbers.

``config.yaml``, ``run.json``, ``metrics.csv``, ``checkpoints/last.ckpt`` and ``best.ckpt``, exported networks,
``predictions.csv``, and what a family adds.
"""

from __future__ import annotations

import json
import shutil
from contextlib import AbstractContextManager
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightning_kd import __version__
from lightning_kd.file_writing import alone, write_text

__all__ = ["RunFolder"]


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

    def clear(self) -> None:
        """Remove what an earlier fit left: checkpoints, exported networks (``*.pt``), metrics, predictions, reports."""
        for name in ("checkpoints", "pictures", "predictions"):
            shutil.rmtree(self.path / name, ignore_errors=True)
        names = [
            "metrics.csv",
            "predictions.csv",
            "predictions.png",
            "noisy_labels.csv",
            "wrong_labels.csv",
            "noise.npz",
            "traceback.txt",
        ]
        names += ["predictions.png", "shifts.json", "shift.json", "sharpness.json"]
        for path in [*self.path.glob("*.pt"), *(self.path / name for name in names)]:
            path.unlink(missing_ok=True)

    def begin(self, verb: str, command: str, seed: int | None) -> None:
        """Write ``run.json`` with outcome ``running``; earlier commands move to its ``history``."""
        if self.path.exists() and not self.path.is_dir():
            raise NotADirectoryError(f"--run {str(self.path)!r} is a file: name a folder")
        try:
            earlier = json.loads(self.record_file.read_text()) if self.record_file.is_file() else {}
        except json.JSONDecodeError as error:
            raise ValueError(f"{self.record_file} is damaged ({error}): remove it, the run needs it no more") from error
        history = earlier.pop("history", [])
        packages = ("torch", "torchvision", "lightning", "torchmetrics", "numpy")
        self.record = {
            "verb": verb,
            "command": command,
            "seed": seed,
            "versions": {"lightning-kd": __version__, **{name: version(name) for name in packages}},
            "start": _now(),
            "end": None,
            "outcome": "running",
            "history": [*history, earlier] if earlier else history,
        }
        self._write_record()

    def end(self, outcome: str, **details: Any) -> None:
        """Note the outcome (``finished``, ``failed`` or ``interrupted``) and what was reached."""
        self.record.update(end=_now(), outcome=outcome, **details)
        self._write_record()

    def _write_record(self) -> None:
        write_text(self.record_file, json.dumps(self.record, indent=2) + "\n")


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
