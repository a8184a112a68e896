"""A page for each method, made of its row in README.md's table, its docstring, its configs and its claim."""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config_commands import commands  # beside this file
from config_texts import first_line, yaml_of

import lightning_kd
from lightning_kd.active_learning.baselines import STRATEGIES
from lightning_kd.claims.claim_file import Claim, read_claim
from lightning_kd.claims.verdict_table import verdict_table
from lightning_kd.cli.config_names import config_folder, config_names

_HEADER = "| method | paper | configs |"
_KINDS = ("optimizer", "callback", "strategy")  # a word before the name


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        name: its first word, or what stands before a colon.
        cell: the first column, in full.
        paper: the second.
        note: the third, as it is written.
        configs: the names that are in it.
        objects: the classes that the first column names, with their full paths.
    """

    name: str
    cell: str
    paper: str
    note: str
    configs: tuple[str, ...]
    objects: tuple[str, ...]

    @property
    def page(self) -> str:
        """The file name of its page."""
        return f"{_slug(self.name)}.md"

    @property
    def family(self) -> str:
        """The folder of its first config."""
        return self.configs[0].partition("/")[0]


def read_methods(root: Path) -> list[Method]:
    """The rows of README.md's table of methods.

    Raises:
        ValueError: where there is no such table, a row names a config that there is not or none, or two rows begin with
            the same word.
    """
    _, header, rest = (root / "README.md").read_text(encoding="utf-8").partition(_HEADER)
    if not header:
        raise ValueError(f"README.md has no table that begins {_HEADER}: the methods' pages are made of it")
    rows = rest.partition("\n\n")[0].splitlines()[2:]
    methods = [_method(row) for row in rows]
    pages = [one.page for one in methods]
    for one in methods:
        if pages.count(one.page) > 1:
            raise ValueError(f"two rows of README.md's table begin with {one.name}: write NAME: before one of them")
    return methods


def methods_by_family(methods: Sequence[Method]) -> dict[str, list[Method]]:
    """Families by their title, in the order in which they are first met."""
    families: dict[str, list[Method]] = {}
    for one in methods:
        families.setdefault(one.family.replace("_", " ").capitalize(), []).append(one)
    return families


def method_index(methods: Sequence[Method]) -> str:
    """The page with all methods in tables, one a family."""
    parts = [
        "# Methods",
        "Each page says what the method does, and has its configs, the commands, all arguments and, where there is "
        "one, the claim.",
    ]
    for family, members in methods_by_family(methods).items():
        parts.append(f"## {family}")
        rows = [f"| {_linked(one)} | {one.paper} |" for one in members]
        parts.append("\n".join(["| method | paper |", "| --- | --- |", *rows]))
    return "\n\n".join(parts) + "\n"


def method_page(one: Method, root: Path) -> str:
    """The page of a method; its links start from ``README.md``."""
    parts = [f"# {one.name}"]
    if _rest(one):
        parts.append(f"{one.cell}.")
    parts.append(_source(one.paper))
    modules = dict.fromkeys(path.rpartition(".")[0] for path in one.objects)
    if one.objects:
        parts += _option(one) or _beginning(one.objects[0])
    claims = _claims(one)
    if claims:
        parts.append("## Does it do what the paper says?")
        parts += [_claim(claim, root) for claim in claims]
    parts += ["## Configs"]
    if re.search(r"\w", re.sub(r"`[^`]+`", "", one.note)):  # more than the names, which stand below
        parts.append(f"{one.note}.")
    parts += [_config(name, one) for name in one.configs]
    parts += [f"::: {path}\n    options:\n      skip_local_inventory: true" for path in one.objects]
    if functions := [name for module in modules for name in _further(module, one)]:
        links = ", ".join(f"[`{name.rpartition('.')[2]}`][{name}]" for name in functions)
        parts += ["## In the same modules", f"{links}."]
    return "\n\n".join(parts) + "\n"


def claims_page(root: Path) -> str:
    """The page of all claims: the verdicts there are, and what can be run."""
    claims = [read_claim(path) for path in sorted((config_folder() / "claims").glob("*.yaml"))]
    results = stored_results(root)
    parts = [
        "# Claims",
        "A claim is a small experiment that could show what a paper claims: `configs/claims/NAME.yaml` has the "
        "sentence, the commands of each setting and what is expected. An expectation holds where the 95 % interval of "
        "the difference, paired over seeds, lies on its side of 0, does not hold where it lies on the other, and is "
        "undecided otherwise: in this small setting, which is not the paper's.",
        "```bash\nlightning-kd claim\nlightning-kd claim dhkd --jobs 2\n```",
        "## Verdicts",
        verdict_table(list(results.values())),
    ]
    if rest := [claim for claim in claims if claim.name not in results]:
        rows = [f"| `{one.name}` | {one.sentence} | {one.source} | {one.minutes:g} |" for one in rest]
        head = ["| claim | | source | minutes of one CPU thread |", "| --- | --- | --- | --: |"]
        parts += ["## Not measured yet", "\n".join([*head, *rows])]
    return "\n\n".join(parts) + "\n"


def stored_results(root: Path) -> dict[str, dict[str, Any]]:
    """The contents of ``docs/claims``, by claim."""
    paths = sorted((root / "docs" / "claims").glob("*.json"))
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def _method(row: str) -> Method:
    cell, paper, note = (part.strip() for part in re.split(r"(?<!\\)\|", row)[1:-1])
    plain = cell.replace("`", "")
    before, colon, _ = plain.partition(":")
    words = re.split(r"[\s,]+", plain)
    name = before if colon and " " not in before else words[words[0] in _KINDS]
    objects = [path for word in re.findall(r"`(\w+)`", cell) if (path := _path_of(word))]
    return Method(name, cell, paper, note, tuple(_configs(note, row)), tuple(objects))


def _configs(note: str, row: str) -> list[str]:
    """``family/a``, ``b``: the folder of one holds for those after it."""
    known, found, folder = set(config_names()), [], ""
    for word in re.findall(r"`([^`]+)`", note):
        folder = word.rpartition("/")[0] or folder
        found.append(f"{folder}/{word.rpartition('/')[2]}")
        if found[-1] not in known:
            raise ValueError(f"README.md's table names the config {found[-1]}, which there is not: {row}")
    if not found:
        raise ValueError(f"README.md's table names no config in this row: {row}")
    return found


def _path_of(word: str) -> str | None:
    found = STRATEGIES.get(word) or getattr(lightning_kd, word, None)
    return f"{found.__module__}.{found.__qualname__}" if inspect.isclass(found) else None


def _slug(name: str) -> str:
    return re.sub(r"\W+", "_", name.lower()).strip("_")


def _linked(one: Method) -> str:
    """The first column, its name a link to the page."""
    name = f"`{one.name}`" if f"`{one.name}`" in one.cell else one.name
    return one.cell.replace(name, f"[{name}](docs/methods/{one.page})", 1)


def _rest(one: Method) -> str:
    """What the first column says beside the name."""
    plain = one.cell.replace("`", "")
    return "" if plain == one.name else one.cell


def _claims(one: Method) -> list[Claim]:
    """Those named as its configs begin, or by its row."""
    stems = [name.rpartition("/")[2] for name in one.configs]
    words = re.findall(r"\w+", f"{one.cell} {one.paper}".replace("-", "_"))
    found = [
        path
        for path in sorted((config_folder() / "claims").glob("*.yaml"))
        if path.stem in words or any(stem.startswith(f"{path.stem}_") for stem in stems)
    ]
    return [read_claim(path) for path in found]


def _claim(claim: Claim, root: Path) -> str:
    parts = [f"{claim.sentence} ({claim.source})", f"```bash\nlightning-kd claim {claim.name}\n```"]
    result = stored_results(root).get(claim.name)
    said = "Not measured yet." if result is None else verdict_table([result])
    return "\n\n".join([*parts, said, *([claim.tried] if claim.tried else [])])


def _config(name: str, one: Method) -> str:
    shown = "\n".join(commands(name, one.configs))
    text = "\n".join(f"    {line}".rstrip() for line in yaml_of(name).splitlines())
    return (
        f"### `{name}`\n\n{first_line(name)}\n\n```bash\n{shown}\n```\n\n"
        f'??? note "{name}.yaml"\n\n    ```yaml\n{text}\n    ```'
    )


def _source(paper: str) -> str:
    """The second column as a sentence: a paper, what is reconstructed of one, or what it says in place of one."""
    if paper.startswith("a reconstruction"):
        return f"This is {paper}."
    published = re.search(r"\b\d{4}, \[", paper)
    return f"Paper: {paper}." if published else f"{paper[0].upper()}{paper[1:]}."


def _option(one: Method) -> list[str]:
    """What the option does that makes a method of another class's, as in ``LSKD: `KD` with `standardize: true```."""
    found = re.search(r"with `(\w+): ", one.cell)
    if not found:
        return []
    said = re.search(rf"^    {found[1]}: (.*?)(?=^    \w|\n\n)", _docstring(one.objects[0]), re.MULTILINE | re.DOTALL)
    if said is None:
        raise ValueError(f"README.md's table names the option {found[1]}, which {one.objects[0]} does not explain")
    return [f"`{found[1]}`: {' '.join(said[1].split())}"]


def _docstring(path: str) -> str:
    module, _, name = path.rpartition(".")
    return inspect.getdoc(getattr(sys.modules[module], name)) or ""


def _beginning(path: str) -> list[str]:
    """The first two paragraphs of a class's docstring: what it is, and what it does."""
    return _docstring(path).partition("\n\nArgs:")[0].split("\n\n")[:2]


def _further(module: str, one: Method) -> list[str]:
    """What else the module offers and defines."""
    names = getattr(sys.modules[module], "__all__", [])
    own = [name for name in names if getattr(sys.modules[module], name).__module__ == module]
    return [path for name in own if (path := f"{module}.{name}") not in one.objects]
