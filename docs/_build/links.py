"""Links of a text in the repository, as they are in the site."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

#: files outside docs/ that the site shows, and their pages
SHOWN = {
    "README.md": "index.md",
    "configs/README.md": "configs.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
_CODE = re.compile(r"(^ *```.*?^ *```|`[^`\n]+`)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<=\]\()([^)\s]+)(?=[)\s])")
_ELSEWHERE = re.compile(r"[a-z]+:|#|/")


def rewritten(text: str, source: str, page: str, root: Path) -> str:
    """The text with each link as it is from ``page``.

    What the site shows is linked there, another file of the repository as a copy below ``repository/``.

    Args:
        text: Markdown; code in it is left alone.
        source: the file that its links start from, such as ``configs/README.md``.
        page: the page that shows it, such as ``configs.md``.
        root: of the repository.

    Raises:
        ValueError: for a link to a file that there is not.
    """

    def place(found: re.Match[str]) -> str:
        link = found[1]
        if _ELSEWHERE.match(link):
            return link
        path, mark, anchor = link.partition("#")
        target = _uri(path, source, root)
        # the page in the place of README.md has other headings
        anchor = "" if target == SHOWN["README.md"] and source != "README.md" and "README.md" in path else anchor
        return posixpath.relpath(target, posixpath.dirname(page) or ".") + (mark + anchor if anchor else "")

    return "".join(part if code else _LINK.sub(place, part) for part, code in _parts(text))


def linked_files(text: str, source: str, root: Path) -> set[str]:
    """The files of the repository that the site must have a copy of for the text's links."""
    links = [link for part, code in _parts(text) if not code for link in _LINK.findall(part)]
    uris = {_uri(link.partition("#")[0], source, root) for link in links if not _ELSEWHERE.match(link)}
    return {uri.removeprefix("repository/") for uri in uris if uri.startswith("repository/")}


def _parts(text: str) -> Iterator[tuple[str, bool]]:
    """The text in pieces, and whether each is code."""
    for number, part in enumerate(_CODE.split(text)):
        yield part, number % 2 == 1


def _uri(path: str, source: str, root: Path) -> str:
    target = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    if target in SHOWN:
        return SHOWN[target]
    if target.startswith("docs/"):
        return target.removeprefix("docs/")  # mkdocs says whether it is there: some pages are generated
    if (root / target).is_file():
        return f"repository/{target}"
    raise ValueError(f"{source} links to {path}, and {target} is no file of the repository: correct the link")
