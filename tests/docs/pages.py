"""The pages that show commands: README, the guides and the methods' pages, and what bash makes of their blocks."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from method_pages import method_page, read_methods  # of docs/_build

from tests.conftest import ROOT

WRITTEN_PAGES = [
    "README.md",
    *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))),
    "configs/README.md",
]
METHOD_PAGES = {f"methods/{one.page}": one for one in read_methods(ROOT)}
OTHER_PROGRAMS = ("make", "pip", "git", "python", "head", "awk", "cd", "cat", "ls")  # recorded, but not run
_BLOCK = re.compile(r"^( *)```(bash|console|sh)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
# every program writes its name, the number of its arguments and these to descriptor 7, each ended by a zero byte
_PRELUDE = (
    """
lightning-kd() {
    printf '%s\\0' lightning-kd $# "$@" >&7
    local word before=
    for word; do [[ $before == --run ]] && command -p mkdir -p "$word"; before=$word; done  # for the patterns behind it
    return 0
}
grep() { return 1; }
command_not_found_handle() { echo "$1 is not known to tests/docs/pages.py" >&2; return 127; }
"""
    + "\n".join(f"{name}() {{ printf '%s\\0' {name} $# \"$@\" >&7; }}" for name in OTHER_PROGRAMS)
    + "\n"
)


@dataclass(frozen=True)
class Command:
    """A command that a page shows.

    Attributes:
        page: the file that shows it.
        line: the first line of its block in that file.
        program: its first word.
        words: the others, after bash has expanded them.
    """

    page: str
    line: int
    program: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {' '.join((self.program, *self.words))}"


@functools.cache
def text_of(page: str) -> str:
    """The Markdown of a page."""
    return method_page(METHOD_PAGES[page], ROOT) if page in METHOD_PAGES else (ROOT / page).read_text(encoding="utf-8")


@functools.cache
def commands_of(page: str) -> tuple[Command, ...]:
    """The commands of a page, in order, loops unrolled.

    Raises:
        AssertionError: if bash cannot run one of its blocks.
    """
    text = text_of(page)
    found: list[Command] = []
    with TemporaryDirectory() as folder:
        for block in _BLOCK.finditer(text):
            line = text.count("\n", 0, block.start()) + 2
            shown = "".join(part.removeprefix(block[1]) for part in block[3].splitlines(keepends=True))
            if block[2] == "console":
                shown = "".join(re.findall(r"^\$ (.*\n)", shown, re.MULTILINE))
            found += [Command(page, line, *one) for one in run_by_bash(shown, Path(folder))]
    return tuple(found)


def run_by_bash(block: str, folder: Path) -> list[tuple[str, tuple[str, ...]]]:
    """The programs that a block starts, and their arguments; none of them is run.

    Raises:
        AssertionError: if bash cannot run it, with bash's message.
    """
    record = folder / "record"
    done = subprocess.run(
        [shutil.which("bash") or "bash", "--noprofile", "--norc", "-u", "-c", f"exec 7> {record}\n{_PRELUDE}{block}"],
        cwd=folder,
        env={"PATH": ""},
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert not done.stderr, f"{done.stderr}\n{block}"
    parts = record.read_text().split("\0")[:-1]
    found = []
    while parts:
        program, count = parts[0], int(parts[1])
        found.append((program, tuple(parts[2 : 2 + count])))
        del parts[: 2 + count]
    return found


def without_repeats(commands: Sequence[Command]) -> list[Command]:
    """The first of each group of commands that differ in numbers alone, such as seeds."""
    kinds: dict[tuple[str, ...], Command] = {}
    for command in commands:
        kinds.setdefault(tuple(re.sub(r"\d+", "#", word) for word in command.words), command)
    return list(kinds.values())
