"""Which parts of the package may import which others; no imports go in a circle."""

import ast
from pathlib import Path

import pytest

import lightning_kd
from lightning_kd.core.registry import FAMILIES

PACKAGE = Path(lightning_kd.__file__).parent
MAY_IMPORT = {
    "nets": set(),
    "compare": set(),
    "claims": {"compare"},
    "pool": set(),
    "core": {"nets"},
    "metrics": {"core"},
    "data": {"core", "pool"},
    "callbacks": {"core", "metrics"},
    **{family: {"core", "nets", "metrics"} for family in FAMILIES},
    "deploy": {"core", "data"},
    "active_learning": {"core", "nets", "metrics", "pool"},
    "cli": {"core", "nets", "metrics", "pool", "compare", "claims", "data", "callbacks", "deploy", *FAMILIES},
}
# modules that every part may import, as they import nothing of the package
FOR_EVERY_PART = ("lightning_kd.argument_checks", "lightning_kd.file_writing", "lightning_kd.spreadsheet")


def imported_parts(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            assert not (isinstance(node, ast.ImportFrom) and node.level), f"relative import in {path}"
            if name.startswith("lightning_kd.") and name not in FOR_EVERY_PART:
                yield name.split(".")[1]


@pytest.mark.parametrize("part", [p for p in MAY_IMPORT if (PACKAGE / p).is_dir()])
def test_each_part_imports_only_the_parts_it_may(part):
    files = list((PACKAGE / part).rglob("*.py"))
    assert files
    for path in files:
        found = set(imported_parts(path)) - {part}
        assert found <= MAY_IMPORT[part], f"{path} imports {found - MAY_IMPORT[part]}"


def test_every_package_folder_has_an_import_rule():
    folders = {p.name for p in PACKAGE.iterdir() if p.is_dir() and (p / "__init__.py").is_file()}
    assert folders <= set(MAY_IMPORT)


def test_cli_files_have_no_circular_imports():
    files = {f"lightning_kd.cli.{path.stem}": path for path in (PACKAGE / "cli").glob("*.py")}
    files["lightning_kd.cli"] = files.pop("lightning_kd.cli.__init__")
    imports = {}
    for name, path in files.items():
        nodes = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ImportFrom)]
        named = {node.module for node in nodes} | {f"{node.module}.{a.name}" for node in nodes for a in node.names}
        imports[name] = named & files.keys()
    left = set(files)
    while ready := {name for name in left if not imports[name] & left}:
        left -= ready
    assert not left


@pytest.mark.parametrize("path", sorted((PACKAGE / "cli").glob("*.py")), ids=lambda path: path.stem)
def test_cli_files_have_at_most_250_lines(path):
    assert len(path.read_text().splitlines()) <= 250


def test_package_files_have_no_circular_imports():
    """Imports inside functions and for types alone count too."""
    files = {path: ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in PACKAGE.rglob("*.py")}
    known = set(files.values())
    graph = {}
    for path, name in files.items():
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)} & known
        graph[name] = found - {name}
    order = []
    while graph:
        free = {name for name, wanted in graph.items() if not wanted & graph.keys()}
        assert free, f"these import one another: {sorted(graph)}"
        order += free
        graph = {name: wanted for name, wanted in graph.items() if name not in free}
    assert len(order) == len(files)
