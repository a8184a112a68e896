"""Whether a command is valid: its verb, configs and options are looked up in milliseconds, without its parser."""

from __future__ import annotations

import argparse
import functools
import importlib
import inspect
import re
from collections.abc import Iterator, Sequence
from typing import Any, get_args, get_type_hints

import lightning as L
import pytest
from config_texts import settings_of  # of docs/_build

import lightning_kd
from lightning_kd.cli.claim_command import find_claim
from lightning_kd.cli.class_help import help_request
from lightning_kd.cli.config_names import config_names
from lightning_kd.cli.named_classes import argument_names, find_class
from lightning_kd.cli.usage import VERBS
from lightning_kd.data import OpenSetDataModule
from lightning_kd.nets import network_names, segmentation_network_names

OF_EVERY_VERB = {"config", "run", "overwrite", "seed_everything", "trainer", "model", "data", "print_config"}
NETWORKS = ("network", "student", "teacher")
_BRACKETS = re.compile(r"^\[.*\]$")


class ParsingDone(Exception):
    """Raised when a light verb has read its options, so that it does no work."""


def check(words: Sequence[str], runs: dict[str, dict[str, Any]], files: Sequence[str]) -> dict[str, Any]:
    """Raise if a command names a verb, config, class or option that does not exist.

    Args:
        words: those after ``lightning-kd``.
        runs: the settings of the runs that the page has made so far, by folder; those of a fit are added.
        files: paths that the reader is assumed to have.

    Returns:
        The settings of its configs; none for a verb that takes no configs.

    Raises:
        ValueError: where something is not known.
    """
    verb, *rest = words
    if verb not in VERBS:
        raise ValueError(f"there is no verb {verb!r}")
    if request := rest and help_request(rest):
        _named_class(*request)
    elif {*rest} & {"--help", "-h"}:
        pass
    elif VERBS[verb].light or VERBS[verb].standalone:
        _check_light(verb, rest)
    else:
        return _check_run(verb, rest, runs, files)
    return {}


def _check_light(verb: str, words: Sequence[str]) -> None:
    """Check the options by the verb's own parser, and stop before its work."""
    if verb == "list":
        return _check_names(words)

    def parse_args(parser: argparse.ArgumentParser, args: Sequence[str]) -> argparse.Namespace:
        given, further = parser.parse_known_args(args)
        raise ParsingDone(given, further)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        if verb == "claim":
            names = [word for word in words[:1] if not word.startswith("-") and word != "list"]
            for name in names:
                find_claim(name)
            known = argparse.ArgumentParser.parse_known_args
            patch.setattr(argparse.ArgumentParser, "parse_known_args", lambda *args: _raise_parsed(known(*args)))
        try:
            importlib.import_module(VERBS[verb].module).main(list(words))
        except ParsingDone as parsed:
            further = parsed.args[1]
            if further and verb != "claim":
                raise ValueError(f"{verb} has no {further[0]}") from None
        except SystemExit:
            raise ValueError(f"{verb} does not read {' '.join(words)}") from None
        else:
            raise AssertionError(f"{verb} does not read its options by argparse: say here how they are checked")
    return None


def _raise_parsed(parsed: Any) -> Any:
    raise ParsingDone(*parsed)


def _check_names(names: Sequence[str]) -> None:
    if unknown := set(names) - _names():
        raise ValueError(f"there is no config {min(unknown)!r}")


def _check_run(
    verb: str, words: Sequence[str], runs: dict[str, dict[str, Any]], files: Sequence[str]
) -> dict[str, Any]:
    flags = list(flags_of(words))
    paths = [value for name, value in flags if name == "config"]
    checkpoints = [value for name, value in flags if name == "ckpt_path" and "/" in value]
    if VERBS[verb].of_checkpoint and not paths:
        paths = [f"{value.split('/checkpoints/')[0]}/config.yaml" for value in checkpoints]
    if not paths:
        raise ValueError("no --config says what is run")
    settings: dict[str, Any] = {}
    for path in paths:
        settings = _merge(settings, _settings_of(path, runs, files))
    for name, value in flags:
        first, *parts = name.split(".")
        if first not in OF_EVERY_VERB | _options(verb):
            raise ValueError(f"{verb} has no option --{name}")
        if first == "trainer" and parts and parts[0] not in inspect.signature(L.Trainer).parameters:
            raise ValueError(f"the Trainer has no {name}")
        if first in ("model", "data") and settings and (verb, name) != ("predict", "data.predict"):
            _check_argument(first, parts, value, settings.setdefault(first, {}), name)
    if verb in ("fit", "active"):
        given = [value for name, value in flags if name == "run"]
        named = "-".join(path.rpartition("/")[2] for path in paths if not path.startswith("_overlay/"))
        runs[given[0] if given else f"runs/{named}"] = settings
    return settings


def flags_of(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The options without their dashes, and their values."""
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise ValueError(f"{word!r} is no option")
        name, equals, value = word[2:].partition("=")
        if not equals and rest and not rest[0].startswith("--"):
            value = rest.pop(0)
        yield name, value


def _settings_of(path: str, runs: dict[str, dict[str, Any]], files: Sequence[str]) -> dict[str, Any]:
    """The settings of a config; none for a file of the reader, which is not known."""
    if path in _names():
        return _shipped(path)
    run = path.removesuffix("/config.yaml")
    if run in runs:
        return runs[run]
    if path in files or (run != path and run in files):
        return {}
    raise ValueError(f"there is no config {path!r}, nor a run of that name before")


_names = functools.cache(lambda: frozenset(config_names()))
_shipped = functools.cache(settings_of)


@functools.cache
def _options(verb: str) -> set[str]:
    if not VERBS[verb].module:
        return {*inspect.signature(getattr(L.Trainer, verb)).parameters} - {"model", "datamodule"} | (
            {"sort"} if verb == "predict" else set()
        )
    function = getattr(importlib.import_module(VERBS[verb].module), verb)
    return {*inspect.signature(function).parameters} - {"trainer", "model", "datamodule"}


@functools.cache
def _arguments(cls: type) -> frozenset[str]:
    return frozenset(argument_names(cls))


def _check_argument(key: str, parts: Sequence[str], value: str, settings: dict[str, Any], name: str) -> None:
    """Whether the class at ``--key`` has an argument ``parts``; a class that is named becomes that of ``settings``."""
    parts = [part for part in parts if part != "init_args"]
    if not parts or parts == ["class_path"]:
        cls = _named_class(key, value)
        settings.update(class_path=f"{cls.__module__}.{cls.__qualname__}", init_args={})
        return
    cls = find_class(key, settings["class_path"])
    known = _arguments(cls)
    if ".".join(parts) in known:
        _check_network(key, parts, value)
        if issubclass(cls, OpenSetDataModule) or not value[:1].isupper():
            return
    if not any(one == parts[0] or one.startswith(f"{parts[0]}.") for one in known):
        raise ValueError(f"{cls.__name__} has no {parts[0]!r} (--{name})")
    inner = settings.setdefault("init_args", {})
    inner[parts[0]] = dict(inner[parts[0]]) if isinstance(inner.get(parts[0]), dict) else {}
    inner = inner[parts[0]]
    if len(parts) == 1 and value[:1].isupper():
        if not _BRACKETS.match(value):
            _check_argument(parts[0], [], value, inner, name)
    elif len(parts) > 1:
        if "class_path" not in inner:
            choices = [one for one in _accepted_classes(cls, parts[0]) if parts[-1] in _arguments(one)]
            if not choices:
                raise ValueError(f"no class that {cls.__name__} takes as {parts[0]} has {parts[-1]!r} (--{name})")
            inner["class_path"] = f"{choices[0].__module__}.{choices[0].__qualname__}"
        _check_argument(parts[0], parts[1:], value, inner, name)


def _named_class(key: str, name: str) -> type:
    """The class that ``--key name`` means."""
    if not name:
        return object
    return getattr(lightning_kd, name, None) or find_class(key, name)


def _check_network(key: str, parts: Sequence[str], value: str) -> None:
    if key != "model" or parts[-1] not in NETWORKS or not re.fullmatch(r"[a-z0-9_]+", value):
        return
    known = [*network_names(), *segmentation_network_names()]
    if value not in known and not re.fullmatch(r"(wrn|mlp)(_\d+)+", value):
        raise ValueError(f"there is no network {value!r}")


def _accepted_classes(cls: type, argument: str) -> Iterator[type]:
    """The package's classes in the annotation of an argument."""
    for base in cls.__mro__:
        if argument in inspect.signature(base.__init__).parameters:
            hint = get_type_hints(base.__init__).get(argument)
            for one in (hint, *get_args(hint)):
                if inspect.isclass(one) and one.__module__.startswith(lightning_kd.__name__):
                    yield one


def _merge(before: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """``own`` merged over ``before``, whose arguments are dropped if the class changes."""
    merged = dict(before)
    if own.get("class_path", merged.get("class_path")) != merged.get("class_path"):
        merged.pop("init_args", None)
    for key, value in own.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else _merge({}, value) if isinstance(value, dict) else value
    return merged
