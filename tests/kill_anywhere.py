"""Kills a command before a chosen file change, and compares the files that runs leave."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from tests.forked import run_forked

_CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def _run(words: list[str], watched: list[str], kill_at: int, count_file: str) -> None:
    from lightning_kd.cli import main

    seen = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in _CHANGES:
            paths = [arg for arg in args if isinstance(arg, str | bytes | os.PathLike)]
        elif event == "open" and isinstance(args[2], int) and args[2] & _WRITING:
            paths = [args[0]]
        else:
            return
        names = [os.path.abspath(os.fsdecode(path)) for path in paths if not isinstance(path, int)]
        if any(name.startswith(tuple(watched)) for name in names):
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

    sys.addaudithook(hook)
    try:
        main(words)
    finally:
        watched.clear()
        Path(count_file).write_text(str(seen))


def killed(words: list[str], folder: Path, run: str, tmpdir: Path, kill_at: int = -1) -> int | None:
    """Run ``lightning-kd WORDS`` in ``folder`` and kill it before the file change ``kill_at``, counted from 0, in the
    folder ``run`` or in ``tmpdir``; returns how many there were where it came to its end, else ``None``."""
    count = folder / "count"
    count.unlink(missing_ok=True)
    tmpdir.mkdir(parents=True, exist_ok=True)
    watched = [str(folder / run), str(tmpdir)]
    done = run_forked(_run, words, watched, kill_at, str(count), folder=folder, TMPDIR=str(tmpdir))
    if done.returncode == -signal.SIGKILL:
        return None
    assert done.returncode == 0, done.stderr
    return int(count.read_text())


def left_behind(folder: Path, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """The content of each file of a run, without times; of ``run.json`` the result of the latest command."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and path.name not in without:
            found[name] = _content(path)
    return found


def differences(one: Any, other: Any, name: str = "") -> list[str]:
    """The places at which two such contents differ, with both values."""
    if isinstance(one, dict) and isinstance(other, dict):
        missing = [f"{name}/{key}" for key in one.keys() ^ other.keys()]
        return missing + [d for key in one if key in other for d in differences(one[key], other[key], f"{name}/{key}")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [d for k, (a, b) in enumerate(zip(one, other, strict=True)) for d in differences(a, b, f"{name}/{k}")]
    return [] if one == other else [f"{name}: {str(one)[:60]} or {str(other)[:60]}"]


def _content(path: Path) -> Any:
    if path.suffix in (".ckpt", ".pt"):
        content = torch.load(path, weights_only=True)
        return _plain({key: value for key, value in content.items() if key != "callbacks"})
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return {name: arrays[name].tolist() for name in arrays}
    if path.name == "run.json":
        record = json.loads(path.read_text())
        return {key: record.get(key) for key in ("verb", "seed", "outcome", "epochs", "rounds", "files")}
    if path.name == "pool.json":
        record = json.loads(path.read_text())
        for row in record["results"]:
            row.pop("seconds", None)
        for row in record["queries"]:
            row.pop("time", None)
        return record
    if path.suffix == ".yaml":
        return yaml.safe_load(path.read_text())
    return "a picture" if path.suffix == ".png" else path.read_text()


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.tolist()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
