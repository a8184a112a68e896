"""What of a claim's runs is done, and how the rest goes on."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_kd.claims.claim_file import TRAINING

__all__ = ["commands_left", "record_of"]


def record_of(run: Path) -> dict[str, Any]:
    """What ``run.json`` holds; nothing where there is none, or it is damaged."""
    try:
        found = json.loads((run / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def commands_left(run: Path, commands: Sequence[list[str]], anew: bool = False) -> list[list[str]]:
    """The commands that are not done yet, as they have to be given now.

    A training that was broken goes on from its ``last.ckpt`` (``active`` by itself); one that left nothing of use
    begins again, and so does all with ``anew``.

    Args:
        run: the folder of the run.
        commands: all commands of the run, the one that trains first.
        anew: throw away what is there.

    Raises:
        ValueError: where the folder holds a training by another command.
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
    """The words of a command, without the program and what only says how it begins."""
    words = shlex.split(command)[1:]
    if words[-2:] == ["--ckpt_path", "last"]:
        del words[-2:]
    return [word for word in words if word != "--overwrite"]
