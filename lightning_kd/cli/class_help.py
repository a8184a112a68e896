"""The output of ``--model.help NAME`` and similar options: a class and its arguments on one screen."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Sequence
from typing import Any

import docstring_parser

from lightning_kd.cli.named_classes import argument_names, find_class, known_classes

__all__ = ["class_help", "help_request"]

WIDTH, MOST_LINES = 118, 60


def help_request(words: Sequence[str]) -> tuple[str, str] | None:
    """The option and the class of a help option among ``words``, or ``None``; the class is empty if none is named.

    ``--model.help DHKD`` and ``--model.help=DHKD`` give ``("model", "DHKD")``.
    """
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if match := re.fullmatch(r"--([\w.]+?)\+?\.help(?:=(.*))?", word):
            following = "" if following.startswith("-") else following
            return match[1], following if match[2] is None else match[2]
    return None


def class_help(key: str, name: str) -> str:
    """The summary and the arguments of the class that ``--key name`` means; without a name, the names of all classes.

    Raises:
        ValueError: if no such class is known.
    """
    if not name:
        names = textwrap.fill(", ".join(known_classes(key)), WIDTH, initial_indent="  ", subsequent_indent="  ")
        return f"--{key} takes one of\n{_cut(names.splitlines())}\n--{key}.help NAME shows the arguments of one"
    cls = find_class(key, name)
    summary = " ".join((inspect.getdoc(cls) or "").partition("\n\n")[0].split())
    head = [f"{cls.__name__} ({cls.__module__})", *textwrap.wrap(summary, WIDTH), ""]
    arguments = [_argument(cls, argument) for argument in argument_names(cls)]
    for layout in (_in_full, _in_two_lines, _in_one_line):
        lines = head + [line for title, sentence in arguments for line in layout(f"--{key}.{title}", sentence)]
        if len(lines) <= MOST_LINES:
            break
    return _cut(lines)


def _in_full(title: str, sentence: str) -> list[str]:
    return [f"  {title}", *textwrap.wrap(sentence, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)]


def _in_two_lines(title: str, sentence: str) -> list[str]:
    return [f"  {title}", *([_short(sentence, 6)] if sentence else [])]


def _in_one_line(title: str, sentence: str) -> list[str]:
    return [_short(f"{title}  {sentence}", 2)]


def _cut(lines: list[str]) -> str:
    more = len(lines) - MOST_LINES
    return "\n".join(lines if more <= 0 else [*lines[: MOST_LINES - 1], f"  and {more + 1} lines more"])


def _short(text: str, indent: int) -> str:
    return " " * indent + textwrap.shorten(text, WIDTH - indent, placeholder=" ...")


def _argument(cls: type, name: str) -> tuple[str, str]:
    """``(title, sentence)`` of an argument of ``cls`` or of a parent that gets it: name, type and default; its doc."""
    parents = [parent for parent in inspect.getmro(cls) if "__init__" in vars(parent)]
    signatures = [inspect.signature(vars(parent)["__init__"]).parameters for parent in parents]
    parameter = next((known[name] for known in signatures if name in known), None)
    title = name
    if parameter is not None:
        if parameter.annotation is not parameter.empty:
            title += f": {_type_name(parameter.annotation)}"
        title += " (required)" if parameter.default is parameter.empty else f" = {_value(parameter.default)}"
    texts = [text for parent in inspect.getmro(cls) if (text := _documented(parent, name))]
    return title, next((text for text in texts if not text.startswith("see ")), "")


def _type_name(annotation: Any) -> str:
    name = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return re.sub(r"\b(?:\w+\.)+(?=\w)", "", name)  # without modules


def _value(default: Any) -> str:
    return default.__name__ if inspect.isclass(default) or inspect.isfunction(default) else repr(default)


def _documented(cls: type, name: str) -> str:
    for text in (vars(cls).get("__doc__"), getattr(vars(cls).get("__init__"), "__doc__", None)):
        try:
            parameters = docstring_parser.parse(inspect.cleandoc(text or "")).params
        except docstring_parser.ParseError:
            continue
        for parameter in parameters:
            if parameter.arg_name == name and parameter.description:
                text = " ".join(parameter.description.replace("``", "").split())
                return re.split(r"(?<=[.])\s(?=[A-Z*])", text)[0]
    return ""
