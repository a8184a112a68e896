"""The imports between the parts of the package go one way."""

import ast
from pathlib import Path

import pytest

import lightning_kd
from lightning_kd.core.registry import FAMILIES

PACKAGE = Path(lightning_kd.__file__).parent
MAY_IMPORT = {
    "nets": set(),
    "compare": set(),
    "metrics": set(),
    "pool": set(),
    "core": {"nets", "metrics"},
    "data": {"core", "pool"},
    "callbacks": {"core", "metrics"},
    **{family: {"core", "nets", "metrics"} for family in FAMILIES},
    "active_learning": {"core", "nets", "metrics", "pool"},
}


def imported_parts(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            assert not (isinstance(node, ast.ImportFrom) and node.level), f"relative import in {path}"
            if name.startswith("lightning_kd."):
                yield name.split(".")[1]


@pytest.mark.parametrize("part", [p for p in MAY_IMPORT if (PACKAGE / p).is_dir()])
def test_arrows_go_one_way(part):
    files = list((PACKAGE / part).rglob("*.py"))
    assert files
    for path in files:
        found = set(imported_parts(path)) - {part}
        assert found <= MAY_IMPORT[part], f"{path} imports {found - MAY_IMPORT[part]}"


def test_every_part_is_known():
    folders = {p.name for p in PACKAGE.iterdir() if p.is_dir() and (p / "__init__.py").is_file()}
    assert folders <= set(MAY_IMPORT)
