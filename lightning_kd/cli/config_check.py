"""Checks of a config: its file before it is parsed, with errors that name the line, and its number of classes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

__all__ = ["check_config", "check_num_classes", "yaml_text"]


def _as_commands_read(base: Any) -> Any:
    """A loader or dumper of PyYAML for which ``1e-4`` is a number and ``2026-01-01`` text, as for jsonargparse."""
    resolvers = {
        first: [(tag, pattern) for tag, pattern in pairs if not tag.endswith(":timestamp")]
        for first, pairs in base.yaml_implicit_resolvers.items()
    }
    kind: Any = type(base.__name__, (base,), {"yaml_implicit_resolvers": resolvers})
    number = re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$")
    kind.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789"))
    return kind


# the C loader, if there is one, is ten times faster
_LOADER = _as_commands_read(getattr(yaml, "CSafeLoader", yaml.SafeLoader))
_DUMPER = _as_commands_read(yaml.SafeDumper)


def check_config(path: str) -> dict[str, Any]:
    """The settings of a config file.

    Raises:
        ValueError: if the file is no YAML mapping, or has a key twice in one mapping, of which YAML would take the
            last. It names the file, the line and what is wrong there.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        root = yaml.compose(text, Loader=_LOADER)
        settings: dict[str, Any] = yaml.load(text, Loader=_LOADER)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8 ({error}): save it as UTF-8") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}" if mark else "it"
        what = ", ".join(part for part in (error.context, error.problem) if part)
        raise ValueError(f"{path} is no YAML, in {place}: {what}: correct it") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML ({getattr(error, 'reason', error)}): correct it") from error
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{path} holds no settings: give NAME: VALUE in each line")
    for name, first, second in _doubled(root, set()):
        raise ValueError(
            f"{path} names {name} twice, in lines {first} and {second}, and YAML takes the last alone: merge them, or "
            "remove one"
        )
    return settings


def yaml_text(settings: dict[str, Any]) -> str:
    """Settings as a text, which is read as ``check_config`` reads a file."""
    return yaml.dump(settings, Dumper=_DUMPER, sort_keys=False, default_flow_style=None, width=110, allow_unicode=True)


def check_num_classes(model: Any, data: Any) -> None:
    """Raise if the settings of a model have another ``num_classes`` than the data, whose number the model always gets.

    Args:
        model: the parsed settings, with ``init_args``.
        data: the data module.

    Raises:
        ValueError: with both numbers.
    """
    given, found = (model.get("init_args") or {}).get("num_classes"), getattr(data, "num_classes", None)
    if given is not None and found is not None and given != found:
        raise ValueError(f"model.num_classes={given}, but the data has {found} classes: leave it out")


def _doubled(node: yaml.Node, seen: set[int], parents: str = "") -> Iterator[tuple[str, int, int]]:
    """``(name, first line, second line)`` of each key that is twice in one mapping below ``node``."""
    if id(node) in seen:  # an alias
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        lines: dict[tuple[str, str], int] = {}
        for key, value in node.value:
            name, line = f"{parents}{key.value}", key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in lines:
                    yield name, lines[key.tag, key.value], line
                lines[key.tag, key.value] = line
            yield from _doubled(value, seen, f"{name}.")
    elif isinstance(node, yaml.SequenceNode):
        for part in node.value:
            yield from _doubled(part, seen, parents)
