"""``lightning-kd list``: the names that can be used in a config or a command.

It parses the package's files instead of importing them, which would take seconds.
"""

from __future__ import annotations

import ast
import difflib
import functools
import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning_kd.cli.composition import can_run, composed_settings, first_line, printed_config
from lightning_kd.cli.config_names import config_folder, config_names, config_path, near_configs

__all__ = ["class_list", "configs_of", "main"]

PACKAGE = Path(__file__).parent.parent


# the base classes of what is listed, and the options that take their subclasses
_OPTIONS = {
    "Task": "--model",
    "Optimizer": "--model.optimizer",
    "Callback": "--trainer.callbacks",
    "LightningDataModule": "--data",
}


def main(args: Sequence[str]) -> None:
    """Print the list of classes and configs, the config of the given names, or the configs of a class or family.

    Raises:
        FileNotFoundError: if nothing has a given name.
        ValueError: if an option is given, or a config that cannot be read.
    """
    if options := [word for word in args if word.startswith("-")]:
        raise ValueError(f"list takes names of configs alone, got {' '.join(options)}: leave it out")
    if len(args) == 1 and not _is_config(args[0]):
        print(configs_of(args[0]))
    else:
        print(printed_config(args) if args else class_list())


def class_list() -> str:
    """The text of ``lightning-kd list``: classes with the first line of their docstrings, networks, configs."""
    package = _parsed()
    networks = _network_names(package.trees[PACKAGE / "nets" / "__init__.py"])
    sections = [
        *package.methods(),
        ["optimizers:", *package.listed("Optimizer")],
        ["callbacks:", *package.listed("Callback")],
        ["data modules:", *package.listed("LightningDataModule")],
        ["networks:", f"  {', '.join(networks)}", "  timm/NAME, torchvision/NAME, NAME+ml_decoder"],
        *_configs(),
        [
            "all arguments of a class:    lightning-kd fit --model.help NAME, --data.help NAME",
            "its configs, or a family's:  lightning-kd list NAME, such as DKD or distillation",
            "what a config holds:         lightning-kd list NAME",
        ],
    ]
    return "\n\n".join("\n".join(lines) for lines in sections)


def configs_of(name: str) -> str:
    """The configs that name a class, in small or large letters, or that are in a folder such as ``distillation``.

    Raises:
        FileNotFoundError: if there is neither, with the nearest names.
    """
    package, names = _parsed(), config_names()
    inside = [config for config in names if config.startswith(f"{name.lower().rstrip('/')}/")]
    kinds = {known: root for root in _OPTIONS for known in package.names(root)}
    known = next((known for known in kinds if known.lower() == name.lower()), None)
    if inside:
        head, found = f"configs of {name}:", inside
    elif known:
        head = f"{known}: {_first_line(package.classes[known])}"
        found = [config for config in names if known in _class_names(composed_settings(_file(config)))]
    else:
        near = [*difflib.get_close_matches(name, kinds, n=3), *near_configs(name)][:3]
        hint = f"did you mean {', '.join(near)}? " if near else ""
        raise FileNotFoundError(
            f"{name!r} is no config, class or folder of configs: {hint}`lightning-kd list` shows all"
        )
    lines = [head, *(_config_line(config) for config in found or ["none of the configs names it"])]
    if not inside and known:
        lines += ["", f"its arguments: lightning-kd fit {_OPTIONS[kinds[known]]}.help {known}"]
    return "\n".join(lines)


class _Package:
    """The classes of the package, as they stand in its files.

    Attributes:
        trees: the parsed files by their paths.
        classes: the definitions of all classes by name.
    """

    def __init__(self) -> None:
        self.trees = {path: ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
        found = [(node, path) for path, tree in self.trees.items() for node in tree.body]
        self.classes = {node.name: node for node, _ in found if isinstance(node, ast.ClassDef)}
        self._folders = {node.name: path.parent.name for node, path in found if isinstance(node, ast.ClassDef)}

    def names(self, root: str) -> list[str]:
        """The exported subclasses of ``root`` that can be built."""
        names = []
        for name in _exported(self.trees, without="core" if root == "Callback" else ""):
            if name in self.classes and not name.endswith("Task"):  # bases
                parents = list(_parents(name, self.classes))
                if root in parents[1:] and not _is_abstract(parents, self.classes):
                    names.append(name)
        return names

    def listed(self, root: str, folder: str = "") -> list[str]:
        """A line for each of ``names``, of those in ``folder`` if it is given."""
        names = [name for name in self.names(root) if folder in ("", self._folders[name])]
        return [f"  {name:<26} {_first_line(self.classes[name])}" for name in names]

    def methods(self) -> list[list[str]]:
        """The methods, a section for each family, after those of none."""
        families: Sequence[str] = ast.literal_eval(
            _assigned(self.trees[PACKAGE / "core" / "registry.py"], "FAMILIES") or "()"
        )
        titles = {"core": "plain training", **{name: name.replace("_", " ") for name in families}}
        return [[f"methods, {title}:", *self.listed("Task", folder)] for folder, title in titles.items()]


def _configs() -> list[list[str]]:
    """Those that name a method and data, and the parts that are added to them."""
    names = config_names()
    whole = {name for name in names if can_run(composed_settings(_file(name)))}
    return [
        ["configs:", *(_config_line(name) for name in names if name in whole)],
        [
            "parts of configs, which need a method or data from another --config:",
            *(_config_line(name) for name in names if name not in whole),
        ],
    ]


@functools.cache
def _parsed() -> _Package:
    return _Package()


def _is_config(name: str) -> bool:
    try:
        config_path(name)
    except FileNotFoundError:
        return False
    return True


def _file(name: str) -> Path:
    return config_folder() / f"{name}.yaml"


def _config_line(name: str) -> str:
    file = _file(name)
    return f"  {name:<48} {first_line(file)}" if file.is_file() else f"  {name}"


def _class_names(settings: Any) -> set[str]:
    """The names in all ``class_path`` of settings, without their modules."""
    if isinstance(settings, list):
        return {name for value in settings for name in _class_names(value)}
    if not isinstance(settings, dict):
        return set()
    own = settings.get("class_path")
    names = {own.rpartition(".")[2]} if isinstance(own, str) else set()
    return names.union(*(_class_names(value) for value in settings.values()))


def _exported(trees: dict[Path, ast.Module], without: str) -> list[str]:
    """The names in ``__all__`` of the packages; those of a family of methods are the names in its modules."""
    names: set[str] = set()
    for folder in {path.parent for path in trees if path.parent.parent == PACKAGE and path.stem == "__init__"}:
        if folder.name == without:
            continue
        own = _all_of(trees[folder / "__init__.py"])
        modules = [tree for path, tree in trees.items() if path.parent == folder and not path.name.startswith("_")]
        names.update(own if own is not None else [name for tree in modules for name in _all_of(tree) or ()])
    return sorted(names)


def _all_of(tree: ast.Module) -> list[str] | None:
    value = _assigned(tree, "__all__")
    return [] if value is None else ast.literal_eval(value) if isinstance(value, ast.List) else None


def _assigned(tree: ast.Module, name: str) -> ast.expr | None:
    """The value that a module gives to ``name``."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return node.value
    return None


def _parents(name: str, classes: dict[str, ast.ClassDef]) -> Iterator[str]:
    """The names of the class and all its bases, up to those of other packages."""
    yield name
    for base in classes[name].bases if name in classes else ():
        yield from _parents(ast.unparse(base).rpartition(".")[2], classes)


def _is_abstract(parents: list[str], classes: dict[str, ast.ClassDef]) -> bool:
    defined: set[str] = set()
    for name in parents:
        for node in classes[name].body if name in classes else ():
            if isinstance(node, ast.FunctionDef) and node.name not in defined:
                if any("abstractmethod" in ast.unparse(decorator) for decorator in node.decorator_list):
                    return True
                defined.add(node.name)
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                defined.update(n.id for n in ast.walk(node) if isinstance(n, ast.Name))
    return False


def _first_line(node: ast.ClassDef) -> str:
    return inspect.cleandoc(ast.get_docstring(node) or "").partition("\n")[0]


def _network_names(tree: ast.Module) -> list[str]:
    """The names of the networks: the keys of the tables in ``nets/__init__.py``."""
    names = ["mlp"]
    for node in tree.body:
        tables = ("_NETWORKS", "_SEGMENTATION")
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) in tables and node.value is not None:
            unknown = {name.id: lambda *args: None for name in ast.walk(node.value) if isinstance(name, ast.Name)}
            names += eval(compile(ast.Expression(node.value), "nets", "eval"), unknown)
    return sorted(names)
