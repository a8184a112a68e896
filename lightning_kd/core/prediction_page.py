"""An HTML page that shows predictions with small pictures, in one file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from html import escape
from pathlib import Path
from typing import Any

from lightning_kd.core.label_page import picture_uri
from lightning_kd.core.notes import note
from lightning_kd.file_writing import write_text

__all__ = ["PAGE_IMAGES", "write_page"]

# browsers are slow with more
PAGE_IMAGES = 500
SIDE = 160

_STYLE = """
body { font: 14px system-ui, sans-serif; margin: 1.5em; color: #222; background: #fff }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(160px, 1fr)); gap: 1em }
figure { margin: 0; overflow-wrap: anywhere }
img { width: 160px; height: 160px; object-fit: contain; background: #eee; image-rendering: pixelated }
small { color: #666 }
"""


def write_page(
    folder: Path,
    index: Sequence[int],
    answers: Sequence[str],
    confidence: Sequence[float] | None,
    data: Any,
) -> None:
    """Write ``predictions.html`` with the first 500 predictions; remove it if the samples are not images.

    If it cannot be written, the user is told, and the run goes on.

    Args:
        folder: the run folder.
        index: indices of the samples, in the order of the page.
        answers: the prediction for each, as text.
        confidence: the probability of each prediction; ``None`` for none.
        data: the data module, whose ``picture_of`` and ``path_of`` give the picture and the path of a sample.
    """
    page = folder / "predictions.html"
    try:
        text = _page_text(index, answers, confidence, data)
        if text is not None:
            write_text(page, text)
            return
    except Exception as error:  # predictions must not fail because of a page
        note(f"predictions.html could not be written ({error}); predictions.csv has all predictions")
    with suppress(OSError):
        page.unlink(missing_ok=True)  # an old page shows other predictions than the table


def _page_text(
    index: Sequence[int], answers: Sequence[str], confidence: Sequence[float] | None, data: Any
) -> str | None:
    shown = list(index[:PAGE_IMAGES])
    if not shown or not hasattr(data, "picture_of") or data.picture_of(shown[0]) is None:
        return None
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        pictures = list(pool.map(lambda i: picture_uri(data.picture_of(i), SIDE), shown))
    figures = []
    for k, (number, picture) in enumerate(zip(shown, pictures, strict=True)):
        share = "" if confidence is None else f" {confidence[k]:.1%}"
        place = data.path_of(number)
        figures.append(
            f'<figure><img src="{picture}" alt="" loading="lazy"><figcaption><b>{escape(str(answers[k]))}</b>{share}'
            f"<br><small>{escape(f'sample {number}' if place is None else str(place))}</small></figcaption></figure>"
        )
    count = f"{len(index)} predictions"
    title = count if len(shown) == len(index) else f"The first {len(shown)} of {count}"
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n<p>All of them are in predictions.csv.</p>\n"
        "<main>\n" + "\n".join(figures) + "\n</main>\n</body>\n</html>\n"
    )
