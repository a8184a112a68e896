"""What mkdocs calls while it builds the site: the generated pages, their places in the navigation, and links.

The facts have their homes elsewhere: the methods in README.md's table, the configs in ``configs``, the verdicts in
``docs/claims``, and all else in docstrings.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from links import SHOWN, linked_files, rewritten  # isort: skip  # beside this file
from method_pages import claims_page, method_index, method_page, methods_by_family, read_methods  # isort: skip
from reference_pages import public_packages, reference_index, reference_page  # isort: skip

ROOT = Path(__file__).parent.parent.parent


def generated_pages() -> dict[str, tuple[str, str]]:
    """Each page that is not in ``docs``: its text, and the file that its links start from."""
    methods = read_methods(ROOT)
    pages = {
        "methods/index.md": (method_index(methods), "README.md"),
        "claims.md": (claims_page(ROOT), "docs/claims.md"),
        "reference/index.md": (reference_index(), "docs/reference/index.md"),
    }
    pages |= {f"methods/{one.page}": (method_page(one, ROOT), "README.md") for one in methods}
    pages |= {f"reference/{name}.md": (reference_page(name), f"docs/reference/{name}.md") for name in public_packages()}
    shown = [path for path in SHOWN if path != "README.md"]  # whose page is written by hand
    return pages | {SHOWN[path]: ((ROOT / path).read_text(encoding="utf-8"), path) for path in shown}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the generated pages where the navigation has their folder."""
    families = methods_by_family(read_methods(ROOT))
    lists: dict[str, list[Any]] = {
        "methods/": [
            "methods/index.md",
            *({family: [{one.name: f"methods/{one.page}"} for one in methods]} for family, methods in families.items()),
        ],
        "reference/": ["reference/index.md", *({name: f"reference/{name}.md"} for name in public_packages())],
    }
    for entry in config.nav or []:
        for title, place in entry.items():
            if isinstance(place, str) and place in lists:
                entry[title] = lists[place]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages, and the files outside ``docs`` that a page links to."""
    linked: set[str] = set()
    try:
        for uri, (text, source) in generated_pages().items():
            files.append(File.generated(config, uri, content=rewritten(text, source, uri, ROOT)))
            linked |= linked_files(text, source, ROOT)
        for file in files.documentation_pages():
            if file.generated_by is None:
                linked |= linked_files(file.content_string, f"docs/{file.src_uri}", ROOT)
    except ValueError as error:
        raise PluginError(str(error)) from error
    for path in sorted(linked):
        files.append(File.generated(config, f"repository/{path}", abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, **kwargs: Any) -> str:
    """Links of a page written by hand that leave ``docs``."""
    if page.file.generated_by is not None:
        return markdown
    return rewritten(markdown, f"docs/{page.file.src_uri}", page.file.src_uri, ROOT)
