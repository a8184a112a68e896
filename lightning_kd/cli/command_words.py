"""Working with the words of a command: adding the config of a run, the default run folder, the command to resume."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from lightning_kd.cli.usage import CHECKPOINT_VERBS

__all__ = ["default_run_folder", "resume_command", "with_config_of_run"]


def with_config_of_run(argv: list[str]) -> list[str]:
    """``argv``, with ``--config`` added for a verb that is given a checkpoint or run folder alone.

    Raises:
        ValueError: if the run of the checkpoint has no ``config.yaml``.
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
    """The default run folder: ``runs/`` and the names of the configs, without overlays.

    For the ``config.yaml`` of a run it is the folder of that run; without configs it is ``runs/`` and ``fallback``.
    """
    paths = [Path(p) for p in config_paths if Path(p).parent.name != "_overlay"]
    if paths and paths[0].name == "config.yaml" and (paths[0].parent / "run.json").is_file():
        return str(paths[0].parent)
    names = [path.stem for path in paths]
    return str(Path("runs") / ("-".join(names) or fallback))


def resume_command(command: str, ckpt_path: str | None = "last") -> str:
    """The command that resumes ``command`` from a checkpoint; ``active`` needs none, give ``None``."""
    kept: list[str] = []
    previous = ""
    for word in shlex.split(command):
        value = previous in ("--ckpt_path", "--overwrite") and not word.startswith("-")
        if not value and word.partition("=")[0] not in ("--ckpt_path", "--overwrite"):
            kept.append(word)
        previous = word
    return shlex.join([*kept, *(["--ckpt_path", ckpt_path] if ckpt_path else [])])
