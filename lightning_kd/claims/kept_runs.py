"""Which commands of a claim's runs are finished, and how to resume the others."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_kd.claims.claim_file import TRAINING

__all__ = ["commands_left", "record_of"]


def record_of(run: Path) -> dict[str, Any]:
    """The content of ``run.json``; empty if there is none, or it is damaged."""
    try:
        found = json.loads((run / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def commands_left(run: Path, commands: Sequence[list[str]], anew: bool = False) -> list[list[str]]:
    """The commands of a run that are not finished, with the options to resume.

    An interrupted training resumes from its ``last.ckpt`` (``active`` does so by itself). Without a checkpoint, or with
    ``anew``, it starts again.

    Args:
        run: the folder of the run.
        commands: all commands of the run, the training first.
        anew: run all commands again.

    Raises:
        ValueError: if the folder holds a training by another command.
    """
    (verb, *words), *further = commands
    record = record_of(run)
    entries = [*record.get("history", []), record] if record else []
    trainings = [i for i, entry in enumerate(entries) if entry.get("verb") in TRAINING]
    last = run / "checkpoints" / "last.ckpt"
    if anew or not trainings:
        there = run.is_dir() and any(run.iterdir())
        return [[verb, *words, *(["--overwrite"] if there else [])], *further]
    training = entries[trainings[-1]]
    if _settings_of(training.get("command", "")) != [verb, *words]:
        raise ValueError(
            f"{run} was made by another command ({training.get('command')}): add --overwrite to make all runs anew, or "
            "name another folder with --run"
        )
    if training.get("outcome") != "finished":
        broken = verb == "fit"
        on = ["--ckpt_path", "last"] if broken and last.is_file() else ["--overwrite"] if broken else []
        return [[verb, *words, *on], *further]
    done = [entry.get("verb") for entry in entries[trainings[-1] + 1 :] if entry.get("outcome") == "finished"]
    return [command for command in further if command[0] not in done]


def _settings_of(command: str) -> list[str]:
    """The words of a command, without the program's name, ``--overwrite`` and ``--ckpt_path last``."""
    words = shlex.split(command)[1:]
    if words[-2:] == ["--ckpt_path", "last"]:
        del words[-2:]
    return [word for word in words if word != "--overwrite"]
