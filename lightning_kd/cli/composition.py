"""Composing a config from others: the key ``compose`` lists its parts, and the other keys are the file's own settings.

.. code-block:: yaml

    compose: [flatness/sam, data/cifar100]
    model: {init_args: {optimizer: {init_args: {rho: 0.1}}}}

Parts are merged from left to right, and then the file's own settings over them. Mappings are merged key by key; other
values, also lists, are replaced. If a ``class_path`` names another class, the ``init_args`` of the earlier class are
dropped. ``callbacks+`` appends to ``callbacks``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_kd.cli.config_check import check_config, yaml_text
from lightning_kd.cli.config_names import config_folder, config_path, near_configs

__all__ = ["can_run", "composed_arguments", "composed_settings", "first_line", "own_files", "printed_config"]

_ORDER = ("seed_everything", "trainer", "data", "model")


def composed_settings(path: str | Path) -> dict[str, Any]:
    """The settings of a config, merged with those of its parts.

    Args:
        path: the file of the config.

    Raises:
        ValueError: if one of the files is not a config, names an unknown part or is a part of itself.
    """
    return _merged([Path(path)])[0]


def composed_arguments(args: Sequence[str], paths: Sequence[str]) -> list[str]:
    """``args`` in which the path of each composed config in ``paths`` is replaced by the merged YAML text.

    Raises:
        ValueError: as ``composed_settings``; files without ``compose`` are checked too.
    """
    texts: dict[str, str] = {}
    for path in paths:
        settings, files = _merged([Path(path)])
        texts[path] = yaml_text(settings) if len(files) > 1 else path
    before = ["", *args]
    return [texts.get(word, word) if before[i] == "--config" else word for i, word in enumerate(args)]


def own_files(paths: Sequence[str]) -> list[str]:
    """The files in which a user's fault may be: these configs, and those of their parts that are not shipped."""
    _, files = _merged([Path(path) for path in paths])
    return list(dict.fromkeys(str(file) for file in files if str(file) in paths or not _is_shipped(file)))


def can_run(settings: dict[str, Any]) -> bool:
    """Whether the settings name a method and data. A config without one of them is a part of others."""
    return all("class_path" in (settings.get(key) or {}) for key in ("model", "data"))


def first_line(path: str | Path) -> str:
    """The comment in the first line of a config, without ``#``; empty if the line is no comment."""
    line = Path(path).read_text(encoding="utf-8-sig").partition("\n")[0]
    return line.lstrip("# ") if line.startswith("#") else ""


def printed_config(names: Sequence[str]) -> str:
    """The text of a complete config: one or several configs merged, with a comment that lists the files.

    Args:
        names: names or paths, as for ``--config``. The file of a single config without ``compose`` is returned as is.

    Raises:
        FileNotFoundError: if a name is unknown.
        ValueError: as ``composed_settings``.
    """
    paths = [Path(config_path(name)) for name in names]
    settings, files = _merged(paths)
    if len(files) == 1:
        return files[0].read_text(encoding="utf-8-sig").rstrip("\n")
    width = max(len(_name(file)) for file in files)
    lines = [first_line(paths[0])] if len(paths) == 1 else []
    lines += [f"{' and '.join(names)}: merged from these files, later ones over earlier ones"]
    lines += [
        f"  {_name(file):<{width}}  {first_line(file) if [file] != paths else 'its own settings'}".rstrip()
        for file in files
    ]
    return "\n".join([*(f"# {line}" for line in lines), yaml_text(settings).rstrip("\n")])


def _merged(paths: Sequence[Path], above: Sequence[Path] = ()) -> tuple[dict[str, Any], list[Path]]:
    """The merged settings of ``paths`` and their parts, and all files in the order of merging.

    ``above`` are the configs that have these as parts, to find one that is a part of itself.
    """
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
    """Settings in which a section in a file of its own, as ``data: mine.yaml``, has the absolute path of this file."""
    beside = {key: folder / value for key, value in settings.items() if str(value).endswith((".yaml", ".yml"))}
    return {**settings, **{key: str(path.absolute()) for key, path in beside.items() if path.is_file()}}


def _part_names(value: Any, path: Path) -> list[str]:
    if not isinstance(value, list) or not value or not all(isinstance(name, str) for name in value):
        raise ValueError(
            f"compose in {path} must be a list of configs, got {value!r}: write compose: [flatness/sam, data/cifar100]"
        )
    return value


def _part(name: str, path: Path) -> Path:
    """The file of a part: of a shipped config by its name, or a ``.yaml`` file relative to the config that lists it."""
    shipped = config_folder() / f"{name}.yaml"
    beside = path.parent / name
    if shipped.is_file():
        return shipped
    if beside.suffix in (".yaml", ".yml") and beside.is_file():
        return beside
    near = near_configs(name)
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
