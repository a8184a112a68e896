"""The words of a command: the config of a run put in, the run folder that they name, the command that goes on."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from lightning_kd.cli.usage import CHECKPOINT_VERBS

__all__ = ["default_run_folder", "resume_command", "with_config_of_run"]


def with_config_of_run(argv: list[str]) -> list[str]:
    """``argv`` with the ``config.yaml`` of the run, where a verb of checkpoints is given a checkpoint alone.

    Raises:
        ValueError: where the checkpoint's run has none.
    """
    if argv[0] not in CHECKPOINT_VERBS:
        return argv
    given = {word.partition("=")[0] for word in argv}
    if given & {"--config", "-c", "--help", "-h"} or not given & {"--ckpt_path", "--run"}:
        return argv

    def value(name: str) -> str:
        for word, following in zip(argv, [*argv[1:], ""], strict=True):
            if word.partition("=")[0] == name:
                return word.partition("=")[2] or following
        return ""

    ckpt_path = value("--ckpt_path")
    run = Path(value("--run")) if ckpt_path in ("", "last", "best") else Path(ckpt_path).parent.parent
    config = run / "config.yaml"
    if not config.is_file():
        raise ValueError(f"{argv[0]} needs the config of the checkpoint's run, and there is no {config}: add --config")
    return [argv[0], "--config", str(config), *argv[1:]]


def default_run_folder(config_paths: Sequence[str], fallback: str) -> str:
    """``runs/`` and the names of the configs, overlays left out; a run's own ``config.yaml`` means that run."""
    paths = [Path(p) for p in config_paths if Path(p).parent.name != "_overlay"]
    if paths and paths[0].name == "config.yaml" and (paths[0].parent / "run.json").is_file():
        return str(paths[0].parent)
    names = [path.stem for path in paths]
    return str(Path("runs") / ("-".join(names) or fallback))


def resume_command(command: str, ckpt_path: str | None = "last") -> str:
    """The command that goes on where ``command`` stopped; ``active`` knows by itself from where."""
    kept: list[str] = []
    previous = ""
    for word in shlex.split(command):
        value = previous in ("--ckpt_path", "--overwrite") and not word.startswith("-")
        if not value and word.partition("=")[0] not in ("--ckpt_path", "--overwrite"):
            kept.append(word)
        previous = word
    return shlex.join([*kept, *(["--ckpt_path", ckpt_path] if ckpt_path else [])])
