"""Reading ``configs/claims/NAME.yaml``: the claim of a paper, the commands of each setting, and the expectations."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lightning_kd.argument_checks import check_numbers

__all__ = ["Claim", "Expectation", "read_claim"]

_NEEDED = ("claim", "source", "minutes", "seeds", "metric", "settings", "expected")
_OPTIONAL = ("shared", "tried")
_OWN_WORDS = ("--run", "--seed_everything", "--overwrite")
#: the verbs that create a run folder
TRAINING = ("fit", "active")
VERBS = (*TRAINING, "validate", "test", "shift", "sharpness")


@dataclass(frozen=True)
class Expectation:
    """The expectation that the metric of setting ``first`` is above (``>``) or below (``<``) that of ``second``."""

    first: str
    sign: str
    second: str

    def __str__(self) -> str:
        return f"{self.first} {self.sign} {self.second}"


@dataclass(frozen=True)
class Claim:
    """One claim.

    Attributes:
        name: the name of its file.
        sentence: the claim in one sentence.
        source: the paper.
        minutes: time of all runs on one CPU thread.
        seeds: the seeds; every setting is run with each.
        metric: the column of ``metrics.csv`` whose last value is compared.
        settings: for each setting its commands, in order, as written in the file: ``{seed}`` is replaced by the seed,
            ``{run}`` by the folder of the run, and an earlier setting's name in braces by its run with the same seed.
        expected: the expectations about the metric.
        tried: remarks, such as what was tried before; may be empty.
    """

    name: str
    sentence: str
    source: str
    minutes: float
    seeds: tuple[int, ...]
    metric: str
    settings: dict[str, tuple[str, ...]]
    expected: tuple[Expectation, ...]
    tried: str = ""

    def run_name(self, setting: str, seed: int) -> str:
        """The name of a run's folder, below that of the claim."""
        return f"{setting}_seed{seed}"

    def needs(self, setting: str) -> list[str]:
        """The settings whose runs ``setting`` uses, such as that of its teacher."""
        named = {name for command in self.settings[setting] for name in _named(command)}
        return [name for name in self.settings if name in named]

    def commands(self, setting: str, seed: int, folder: Path, further: Sequence[str] = ()) -> list[list[str]]:
        """The words of each command of a run.

        Args:
            setting: name of the setting.
            seed: seed of the run.
            folder: folder of the claim.
            further: words that are added to the training command.
        """
        run = folder / self.run_name(setting, seed)
        values = {name: str(folder / self.run_name(name, seed)) for name in self.settings}
        values |= {"seed": str(seed), "run": str(run)}
        result = []
        for command in self.settings[setting]:
            verb, *words = [_filled(word, values) for word in shlex.split(command)]
            config = [] if "--config" in words else ["--config", f"{run}/config.yaml"]
            own = ["--seed_everything", str(seed), *further] if verb in TRAINING else []
            result.append([verb, *config, *words, "--run", str(run), *own])
        return result


def read_claim(path: Path) -> Claim:
    """The claim in a file.

    Raises:
        ValueError: if something is wrong in it.
        FileNotFoundError: if there is no such file.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML ({' '.join(str(error).split())}): correct it") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no claim: give {', '.join(_NEEDED)}")
    try:
        return _claim(path.stem, content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _claim(name: str, content: dict[str, Any]) -> Claim:
    known = (*_NEEDED, *_OPTIONAL)
    if missing := [key for key in _NEEDED if key not in content]:
        raise ValueError(f"there is no {missing[0]}: a claim has {', '.join(_NEEDED)}")
    if unknown := [key for key in content if key not in known]:
        raise ValueError(f"{unknown[0]!r} is not a key of a claim: give only {', '.join(known)}")
    for key in ("claim", "source", "metric", *(key for key in _OPTIONAL if key in content)):
        if not isinstance(content[key], str) or not content[key].strip():
            raise ValueError(f"{key} must be a text, got {content[key]!r}: write it in words")
    check_numbers(above=0, minutes=content["minutes"])
    settings = _settings(content["settings"], content.get("shared", ""))
    expected = _expected(content["expected"], settings)
    seeds = seeds_of(content["seeds"])
    sentence, source, tried = (" ".join(content.get(key, "").split()) for key in ("claim", "source", "tried"))
    minutes, metric = float(content["minutes"]), content["metric"]
    return Claim(name, sentence, source, minutes, seeds, metric, settings, expected, tried)


def seeds_of(value: Any) -> tuple[int, ...]:
    """The seeds from a list of them, or from their number ``n`` (then 0 to n - 1).

    Raises:
        ValueError: if ``value`` is neither.
    """
    if not isinstance(value, list):
        check_numbers(least=1, whole=True, seeds=value, remedy="say how many, or name several in a list")
        return tuple(range(value))
    check_numbers({f"seeds[{i}]": seed for i, seed in enumerate(value)}, least=0, whole=True)
    if not value or len(set(value)) < len(value):
        raise ValueError(f"seeds must be different numbers, got {value}: name each once")
    return tuple(value)


def _settings(given: Any, shared: str) -> dict[str, tuple[str, ...]]:
    if not isinstance(given, dict) or not given:
        raise ValueError(f"settings must be names with commands, got {given!r}: give NAME: fit --config ...")
    settings: dict[str, tuple[str, ...]] = {}
    for name, commands in given.items():
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z]\w*", name) or name in ("seed", "run", "logs"):
            raise ValueError(
                f"settings: {name!r} cannot be the name of a setting: take letters, digits and _, and not seed, run or "
                "logs"
            )
        commands = [commands] if isinstance(commands, str) else commands
        if not isinstance(commands, list) or not commands or not all(isinstance(text, str) for text in commands):
            raise ValueError(f"settings: {name} must be a command or a list of them, got {commands!r}")
        commands = [f"{commands[0]} {shared}".strip(), *commands[1:]]
        for number, command in enumerate(commands):
            _check_command(name, command, number == 0, settings)
        settings[name] = tuple(" ".join(command.split()) for command in commands)
    return settings


def _check_command(setting: str, command: str, first: bool, before: dict[str, Any]) -> None:
    try:
        verb, *words = shlex.split(command)
    except ValueError as error:
        raise ValueError(f"settings: {setting}: {command!r} is no command ({error}): correct it") from None
    allowed = TRAINING if first else VERBS
    if verb not in allowed or (not first and verb in TRAINING):
        wanted = "begins with" if first else "goes on with"
        verbs = TRAINING if first else [verb for verb in VERBS if verb not in TRAINING]
        raise ValueError(f"settings: {setting} {wanted} {verb!r}: take {', '.join(verbs)}")
    if first and "--config" not in words:
        raise ValueError(f"settings: {setting} names no --config: add --config NAME")
    if own := [word for word in words if word.partition("=")[0] in _OWN_WORDS]:
        raise ValueError(f"settings: {setting} gives {own[0]}, which is set for each run: leave it out")
    for name in _named(command):
        if name not in (*before, "seed", "run"):
            raise ValueError(
                f"settings: {setting} names {{{name}}}, which is no earlier setting: take {', '.join(before)}"
                f"{', ' if before else ''}seed or run"
            )


def _expected(given: Any, settings: dict[str, Any]) -> tuple[Expectation, ...]:
    if not isinstance(given, list) or not given:
        raise ValueError(f"expected must be a list of comparisons, got {given!r}: give - one > other")
    result = []
    for text in given:
        found = re.fullmatch(r"\s*(\w+)\s*([<>])\s*(\w+)\s*", str(text))
        if not found:
            raise ValueError(f"expected: {text!r} is no comparison: write one > other or one < other")
        for name in (found[1], found[3]):
            if name not in settings:
                raise ValueError(f"expected: {name!r} is no setting: they are {', '.join(settings)}")
        if found[1] == found[3]:
            raise ValueError(f"expected: {text!r} compares a setting with itself: name two")
        result.append(Expectation(*found.groups()))
    return tuple(result)


def _named(command: str) -> list[str]:
    return re.findall(r"\{(\w+)\}", command)


def _filled(word: str, values: dict[str, str]) -> str:
    return re.sub(r"\{(\w+)\}", lambda found: values[found[1]], word)
