"""Turning jsonargparse's error reports into one sentence: what is wrong, and what was probably meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from torch.optim import SGD

from lightning_kd.cli.named_classes import argument_names, find_class, known_classes, near_names

__all__ = ["one_sentence"]

# lines of the report about how the parser works
_NOISE = re.compile(
    r"Errors:|Subtypes:.*|Given value.*|Does not validate against any of the Union subtypes|"
    r"Problem with given class_path.*|Parser key \"[^\"]*\":|"
    r"- Expected a path but.*|- Expected a <class '(?:NoneType|list)'>"
)


def one_sentence(message: str, options: Sequence[str] = ()) -> str:
    """The parser's error ``message`` in one sentence.

    Args:
        message: the message of jsonargparse.
        options: the options of the verb, such as ``--trainer.max_epochs``, for suggestions.
    """
    keys = ".".join(re.findall(r'Parser key "([^"]*)"', message))
    if match := re.search(r"Option '([^']+)' is not accepted", message):
        return _unknown_argument(keys, match[1], message)
    if match := re.search(r"Expected a dot import path string: (\S+)", message):
        if kind := re.search(r"Expected a <class '(int|float|bool)'>", message):  # of a number or a class
            return f"--{keys} must be of type {kind[1]}, got {match[1]}"
        return _unknown_class(keys, match[1])
    if match := re.search(r"Expected an? (.+?)\. Got value: (.*?)(?:\. Got value: .*)?$", message, re.MULTILINE):
        return f"--{keys} must be {_wanted([match[1]])}, got {match[2]}"
    if match := re.match(r"unrecognized arguments: (.*)", message):
        return _unknown_option(match[1], options)
    if match := re.search(r"does not accept option '([^']+)'", message):  # an option in a config file
        return _unknown_option(f"--{match[1]}", options)
    if match := re.search(r"arguments are required: (.*)", message):
        return _missing(match[1].replace(" ", "").split(","), message, keys)
    if match := re.search(r"Not a valid subclass of .*?Given value: (\[[^\n]*)", message, re.DOTALL):
        return f"--{keys} must be one name, or a class_path with init_args, got the list {match[1]}: give one"
    types = re.findall(r"^\s*- Expected an? (<class '[^']+'>|typing\.Literal\[.*?\])$", message, re.MULTILINE)
    given = re.search(r"Given value: (.*)", message)
    if given and types and len(types) == len(re.findall(r"^\s*- ", message, re.MULTILINE)):
        return f"--{keys} must be {_wanted(types)}, got {given[1]}"
    lines = [line.strip() for line in message.splitlines()]
    lines = [line.removeprefix("- ") for line in lines if line and not _NOISE.fullmatch(line)]
    return f"{f'--{keys}: ' if keys else ''}{'; '.join(dict.fromkeys(lines)) or message}"


def _unknown_argument(keys: str, name: str, message: str) -> str:
    key = keys.split(".init_args")[0]
    paths = re.findall(r"class_path[ =]'([^']+)'", message)
    head = f"--{key}.{name} does not exist"
    try:
        cls = find_class(key, paths[-1])
        arguments = argument_names(cls)
    except (ValueError, IndexError):
        return head
    value = re.search(r"val='([^']*)'", message)
    if "optimizer" in arguments and (own := {"learning_rate": "lr"}.get(name, name)) in argument_names(SGD):
        return (
            f"{head}, as it belongs to the optimizer: --{key}.optimizer SGD --{key}.optimizer.{own} "
            f"{value[1] if value else '...'}"
        )
    shown = cls.__name__ if known_classes(key).get(cls.__name__) is cls else paths[-1]
    near = near_names(name, arguments, f"--{key}.") or ":"
    return f"{head}{near} --{key}.help {shown} shows what there is"


def _unknown_class(key: str, name: str) -> str:
    try:
        find_class(key, name)
    except ValueError as error:
        return f"{error}{'' if str(error).endswith('?') else ':'} `lightning-kd list` shows all"
    return f"--{key} {name} is of another kind: --{key}.help shows what it takes"


def _unknown_option(words: str, options: Sequence[str]) -> str:
    word = next((word for word in words.split() if word.startswith("--")), "")
    if not word:
        return f"{words!r} belongs to no option: write --NAME VALUE"
    name = word[2:].partition("=")[0]
    head, dot, rest = name.partition(".")
    heads = {option[2:].partition(".")[0] for option in options}
    if dot and head not in heads:
        near = difflib.get_close_matches(head, heads, n=1)
        return f"--{name} does not exist{f': did you mean --{near[0]}.{rest}?' if near else ''}"
    places = [option for option in options if option.rpartition(".")[2] == name]
    for key in ("model", "data"):
        if not dot and not places and any(name in argument_names(cls) for cls in known_classes(key).values()):
            places.append(f"--{key}.{name}")
    if not dot and not places and name in argument_names(SGD):
        places.append(f"--model.optimizer.{name}")
    hint = f": did you mean {places[0]}?" if places else near_names(f"--{name}", options)
    return f"--{name} does not exist{hint}"


def _wanted(types: Sequence[str]) -> str:
    """The types that an option takes, as jsonargparse prints them, in words."""
    start = "typing.Literal["
    values = [kind.removeprefix(start)[:-1] for kind in types if kind.startswith(start)]
    kinds = [kind.removeprefix("<class '").removesuffix("'>") for kind in types if not kind.startswith(start)]
    kinds = [kind for kind in kinds if kind != "NoneType"]
    words = [f"one of {', '.join(values)}"] if values else []
    words += [f"of type {' or '.join(kinds)}"] if kinds else []
    return " or ".join([*words, *(["null"] if "<class 'NoneType'>" in types else [])])


def _missing(names: Sequence[str], message: str, key: str) -> str:
    path = re.findall(r"Problem with given class_path '([^']+)'", message)
    if path := path or re.findall(r"class_path[ =]'([^']+)'", message):
        cls = path[-1].rpartition(".")[2]
        return f"--{key} {cls} needs {', '.join(names)}: give it as --{key}.{names[0]}, or use a config"
    short = ", ".join(f"--{name.rpartition('.')[2]}" for name in names)
    return f"{short} missing: name a config with --config, `lightning-kd list` shows them all, or give them one by one"
