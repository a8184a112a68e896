"""README and the pages in docs: no link is broken, and README stays short."""

import re

import pytest

from tests.conftest import ROOT

PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
LINK = re.compile(r"(?<=\]\()(?![a-z]+:)([^)\s]+)(?=\))")
GENERATED = re.compile(r"docs/(claims\.md|methods/\w+\.md|reference/\w+\.md)$")  # by `make docs`


def text_of(path):
    """The text of a page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors_of(path):
    """The anchors of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.*)$", text_of(path), re.MULTILINE)
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_existing_files_and_headings(page):
    for link in LINK.findall(text_of(ROOT / page)):
        path, _, anchor = link.partition("#")
        target = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        if GENERATED.match(target.relative_to(ROOT).as_posix()):
            assert page != "README.md", f"{link} is a page of the site alone"
            continue
        assert target.is_file(), f"{page} links to {link}"
        assert not anchor or anchor in anchors_of(target), f"{page} links to {link}"


def test_readme_has_at_most_200_lines_and_links_to_every_page():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 200
    linked = {link.partition("#")[0] for link in LINK.findall(readme)}
    assert {*PAGES} - {"README.md"} <= linked
