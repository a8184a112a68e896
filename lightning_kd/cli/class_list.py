"""``lightning-kd list``: the names that can be used in a config or a command.

It parses the package's files instead of importing them, which would take seconds.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path

from lightning_kd.cli.composition import can_run, composed_settings, first_line, printed_config
from lightning_kd.cli.config_names import config_folder, config_names

__all__ = ["class_list", "main"]

PACKAGE = Path(__file__).parent.parent


def main(args: Sequence[str]) -> None:
    """Print the list of classes and configs, or the config of the given names.

    Raises:
        FileNotFoundError: if there is no config of a given name.
        ValueError: if an option is given, or a config that cannot be read.
    """
    if options := [word for word in args if word.startswith("-")]:
        raise ValueError(f"list takes names of configs alone, got {' '.join(options)}: leave it out")
    print(printed_config(args) if args else class_list())


def class_list() -> str:
    """The text of ``lightning-kd list``: classes with the first line of their docstrings, networks, configs."""
    trees = {path: ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
    classes = {node.name: node for tree in trees.values() for node in tree.body if isinstance(node, ast.ClassDef)}

    def listed(root: str) -> list[str]:
        lines = []
        for name in _exported(trees, without="core" if root == "Callback" else ""):
            if name in classes and not name.endswith("Task"):  # bases
                parents = list(_parents(name, classes))
                if root in parents[1:] and not _is_abstract(parents, classes):
                    lines.append(f"  {name:<26} {_first_line(classes[name])}")
        return lines

    networks = _network_names(trees[PACKAGE / "nets" / "__init__.py"])
    sections = [
        ["methods:", *listed("Task")],
        ["optimizers:", *listed("Optimizer")],
        ["callbacks:", *listed("Callback")],
        ["data modules:", *listed("LightningDataModule")],
        ["networks:", f"  {', '.join(networks)}", "  timm/NAME, torchvision/NAME, NAME+ml_decoder"],
        *_configs(),
        [
            "all arguments of a class:    lightning-kd fit --model.help NAME, --data.help NAME",
            "what a config holds:         lightning-kd list NAME",
        ],
    ]
    return "\n\n".join("\n".join(lines) for lines in sections)


def _configs() -> list[list[str]]:
    """Those that name a method and data, and the parts that are added to them."""
    paths = {name: config_folder() / f"{name}.yaml" for name in config_names()}
    whole = {name for name, path in paths.items() if can_run(composed_settings(path))}
    lines = {name: f"  {name:<48} {first_line(path)}" for name, path in paths.items()}
    return [
        ["configs:", *(lines[name] for name in paths if name in whole)],
        [
            "parts of configs, which need a method or data from another --config:",
            *(lines[name] for name in paths if name not in whole),
        ],
    ]


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
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value) if isinstance(node.value, ast.List) else None
    return []


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
