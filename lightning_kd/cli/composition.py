"""Configs that are composed of others: the key ``compose`` names the parts, and what else the file holds is its own.

.. code-block:: yaml

    compose: [flatness/sam, data/cifar100]
    model: {init_args: {optimizer: {init_args: {rho: 0.1}}}}

Parts are merged from left to right, and the file's own settings over them. A mapping is merged key by key; everything
else, lists too, is replaced. A ``class_path`` that differs takes the ``init_args`` of the class before away, and
``callbacks+`` adds to the ``callbacks`` there are.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_kd.cli.config_check import check_config, yaml_text
from lightning_kd.cli.config_names import config_folder, config_names, config_path

__all__ = ["can_run", "composed_arguments", "composed_settings", "first_line", "own_files", "printed_config"]

_ORDER = ("seed_everything", "trainer", "data", "model")


def composed_settings(path: str | Path) -> dict[str, Any]:
    """The settings of a config, those of its parts merged in.

    Args:
        path: its file.

    Raises:
        ValueError: where one of the files is no config, names an unknown part or is a part of itself.
    """
    return _merged([Path(path)])[0]


def composed_arguments(args: Sequence[str], paths: Sequence[str]) -> list[str]:
    """``args`` with the merged YAML of each config in ``paths`` that is composed in the place of its path.

    Raises:
        ValueError: as ``composed_settings``; the files that are not composed are checked, too.
    """
    texts: dict[str, str] = {}
    for path in paths:
        settings, files = _merged([Path(path)])
        texts[path] = yaml_text(settings) if len(files) > 1 else path
    before = ["", *args]
    return [texts.get(word, word) if before[i] == "--config" else word for i, word in enumerate(args)]


def own_files(paths: Sequence[str]) -> list[str]:
    """The configs of these paths and those of their parts that are not shipped, where a fault may be."""
    _, files = _merged([Path(path) for path in paths])
    return list(dict.fromkeys(str(file) for file in files if str(file) in paths or not _is_shipped(file)))


def can_run(settings: dict[str, Any]) -> bool:
    """Whether the settings name a method and data; other configs are parts, to be added to one that does."""
    return all("class_path" in (settings.get(key) or {}) for key in ("model", "data"))


def first_line(path: str | Path) -> str:
    """What the comment in the first line of a config says; nothing where there is none."""
    line = Path(path).read_text(encoding="utf-8-sig").partition("\n")[0]
    return line.lstrip("# ") if line.startswith("#") else ""


def printed_config(names: Sequence[str]) -> str:
    """A config that can be copied: what several are together, the parts in comments above it.

    Args:
        names: names or paths, as ``--config`` takes them; one that is composed of nothing is printed as it is.

    Raises:
        FileNotFoundError: where there is none of that name.
        ValueError: as ``composed_settings``.
    """
    paths = [Path(config_path(name)) for name in names]
    settings, files = _merged(paths)
    if len(files) == 1:
        return files[0].read_text(encoding="utf-8-sig").rstrip("\n")
    width = max(len(_name(file)) for file in files)
    lines = [first_line(paths[0])] if len(paths) == 1 else []
    lines += [f"{' and '.join(names)}: the settings of these, each over those before it"]
    lines += [
        f"  {_name(file):<{width}}  {first_line(file) if [file] != paths else 'its own'}".rstrip() for file in files
    ]
    return "\n".join([*(f"# {line}" for line in lines), yaml_text(settings).rstrip("\n")])


def _merged(paths: Sequence[Path], above: Sequence[Path] = ()) -> tuple[dict[str, Any], list[Path]]:
    """The settings of all, and the files that they are from, in their order."""
    settings: dict[str, Any] = {}
    files: list[Path] = []
    for path in paths:
        if path.resolve() in [file.resolve() for file in above]:
            way = " -> ".join(_name(file) for file in [*above, path])
            raise ValueError(f"{path} is a part of itself ({way}): take one of them out of its compose")
        own = _with_paths(check_config(str(path)), path.parent)
        parts = [_part(name, path) for name in _part_names(own.pop("compose"), path)] if "compose" in own else []
        below, further = _merged(parts, [*above, path])
        settings = _over(_over(settings, below), own)
        files += [*further, path]
    return {key: settings[key] for key in sorted(settings, key=_place)}, files


def _with_paths(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The settings with whole paths to the files beside them that hold a section, as in ``data: mine.yaml``."""
    beside = {key: folder / value for key, value in settings.items() if str(value).endswith((".yaml", ".yml"))}
    return {**settings, **{key: str(path.absolute()) for key, path in beside.items() if path.is_file()}}


def _part_names(value: Any, path: Path) -> list[str]:
    if not isinstance(value, list) or not value or not all(isinstance(name, str) for name in value):
        raise ValueError(
            f"compose in {path} must be a list of configs, got {value!r}: write compose: [flatness/sam, data/cifar100]"
        )
    return value


def _part(name: str, path: Path) -> Path:
    """The file of a part: a shipped name, or a file ending in .yaml, seen from the one that names it."""
    shipped = config_folder() / f"{name}.yaml"
    beside = path.parent / name
    if shipped.is_file():
        return shipped
    if beside.suffix in (".yaml", ".yml") and beside.is_file():
        return beside
    near = difflib.get_close_matches(name, config_names(), n=3, cutoff=0.3)
    hint = f"did you mean {', '.join(near)}?" if near else "`lightning-kd list` shows all"
    raise ValueError(
        f"{path} is composed of {name!r}, which is neither a shipped config nor a .yaml file beside it: {hint}"
    )


def _over(before: Any, own: Any) -> Any:
    """``own`` merged over ``before``, neither of them changed."""
    if not isinstance(before, dict) or not isinstance(own, dict):
        return own
    result = dict(before)
    if not _same_class(before.get("class_path"), own.get("class_path")):
        result.pop("init_args", None)
    for key, value in own.items():
        plain = key[:-1] if isinstance(key, str) and key.endswith("+") else None
        if plain is None:
            result[key] = _over(result.get(key), value)
            result.pop(f"{key}+", None)
        else:
            there = plain if plain in result else key
            result[there] = [*_as_list(result.get(there)), *_as_list(value)]
    return {**({"class_path": result["class_path"]} if "class_path" in result else {}), **result}


def _same_class(before: Any, own: Any) -> bool:
    """Whether two values of ``class_path`` name one class, as ``SAM``, ``lightning_kd.SAM`` and its full path do.

    ``None`` stands for the class of the other.
    """
    if before == own or not isinstance(before, str) or not isinstance(own, str):
        return True
    first, second = before.split("."), own.split(".")
    return first[-1] == second[-1] and (1 in (len(first), len(second)) or first[0] == second[0])


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _place(key: str) -> int:
    return _ORDER.index(key) if key in _ORDER else len(_ORDER)


def _name(path: Path) -> str:
    return path.relative_to(config_folder()).with_suffix("").as_posix() if _is_shipped(path) else str(path)


def _is_shipped(path: Path) -> bool:
    return path.is_relative_to(config_folder())
