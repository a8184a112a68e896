"""Compare run folders: group the runs that differ only in seed, and write mean, std, n, last and best.

``lightning-kd compare RUN...`` prints one table per metric and writes ``compare.csv``, ``compare.md`` and
``compare.png``. Neither torch nor lightning is imported here, so that a comparison starts at once.

What the columns mean, for one group and one metric:

- ``n``: the number of runs that recorded the metric,
- ``last``: each run's value at the last epoch that has it, in the order of the seeds; for ``test/...`` the value
  recorded last,
- ``mean``, ``std``: over the ``last`` values; the sample standard deviation (n - 1), blank for one run,
- ``best``, ``best_std``: the same over each run's best epoch. Blank for ``test/...``: choosing an epoch by its test
  value is no result.

The best epoch is the smallest value where a word of the name is loss, ece, err, nll ... (``runs.LOWER``), the largest
where one is acc, auc, precision, recall, f1 ... (``runs.HIGHER``); other names have no best. Words are what ``/``,
``_`` and ``-`` separate, without trailing digits (``acc5`` is acc). Metrics of ``HIGHER`` that lie in [0, 1] are shown
in percent, and are fractions in the CSV.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from lightning_kd.compare.groups import Group, Summary, compare_runs
from lightning_kd.compare.render import to_csv, to_markdown, to_png
from lightning_kd.compare.runs import Run, direction, expand
from lightning_kd.file_writing import written_whole

__all__ = ["Group", "Run", "Summary", "compare_runs", "direction", "main", "to_csv", "to_markdown", "to_png"]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{self.prog}: {message}.")


def main(argv: Sequence[str]) -> None:
    """The command: print the tables, write ``compare.csv``, ``compare.md`` and ``compare.png``, print where they are.

    Raises:
        ValueError: of one sentence, where the arguments or the run folders cannot be used.
    """
    parser = _Parser(
        prog="lightning-kd compare",
        description="Group runs that differ only in seed; write mean, std, n, last and best as a table and a picture.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run folder, or a folder of run folders")
    parser.add_argument(
        "--metric",
        action="append",
        metavar="NAME",
        help="a column of metrics.csv, such as val/loss; may be given several times (default: acc, map or miou)",
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        type=Path,
        help="where the three files go (default: the folder `compare` in the folder that holds all the runs)",
    )
    args = parser.parse_args(list(argv))

    folders, left_out = expand(args.runs)
    groups = compare_runs(folders, args.metric)
    output = args.output or _default_output(folders)
    markdown = to_markdown(groups, left_out)
    print(markdown)
    files = {"csv": to_csv(groups).encode(), "md": markdown.encode(), "png": to_png(groups)}
    try:
        for suffix, content in files.items():
            with written_whole(output / f"compare.{suffix}") as part:
                part.write_bytes(content)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise ValueError(f"{output} cannot be written ({reason}); name another with --output.") from None
    for suffix in files:
        print(output / f"compare.{suffix}")


def _default_output(folders: Sequence[Path]) -> Path:
    common = Path(os.path.commonpath([folder.absolute().parent for folder in folders]))
    return (common.relative_to(Path.cwd()) if common.is_relative_to(Path.cwd()) else common) / "compare"
