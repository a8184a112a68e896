"""The table of verdicts in ``README.md``, made from ``docs/claims/*.json`` by ``make verdicts``."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_kd.file_writing import write_text

__all__ = ["main", "verdict_table", "with_table"]

BEGIN, END = "<!-- verdicts: make verdicts -->", "<!-- end of verdicts -->"


def verdict_table(results: Sequence[Mapping[str, Any]]) -> str:
    """The table, with a row for each expectation of each claim.

    Args:
        results: the contents of the ``claim.json`` files.
    """
    rows = ["| claim | expected of | difference, 95 % interval | verdict |", "| --- | --- | --- | --- |"]
    for result in results:
        for number, one in enumerate(result["expected"]):
            scale, unit = (100, " %") if result["percent"] else (1, "")
            difference, low, high = (_signed(value, scale) for value in (one["difference"], *one["interval"]))
            sentence = f"`{result['name']}`: {result['claim']}" if number == 0 else ""
            about = f"{one['expected']}, {result['metric']}, n = {len(result['seeds'])}"
            rows.append(f"| {sentence} | {about} | {difference} [{low}, {high}]{unit} | {one['verdict']} |")
    return "\n".join(rows)


def with_table(text: str, table: str) -> str:
    """``text`` with ``table`` between the two marks.

    Raises:
        ValueError: unless it has both marks once.
    """
    if len(re.findall(re.escape(BEGIN), text)) != 1 or END not in text.partition(BEGIN)[2]:
        raise ValueError(f"the text needs the lines {BEGIN} and {END}, once each: put them where the table belongs")
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{rest.partition(END)[2]}"


def main(folder: Path = Path("docs/claims"), readme: Path = Path("README.md")) -> None:
    """Write the table into ``readme``."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    write_text(readme, with_table(readme.read_text(encoding="utf-8"), verdict_table(results)))


def _signed(value: float | None, scale: float) -> str:
    return "?" if value is None else f"{scale * value:+.3g}"


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
