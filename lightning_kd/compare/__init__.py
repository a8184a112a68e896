"""Compare run folders: group the runs that differ only in seed, and write mean, std, n, last and best.

``lightning-kd compare RUN...`` prints one table for each metric and writes ``compare.csv``, ``compare.md`` and
``compare.png``. Neither torch nor lightning is imported here, so that the command starts fast.

The columns, for one group and one metric:

- ``n``: the number of runs that recorded the metric,
- ``last``: each run's value at the last epoch with a value, in the order of the seeds; for ``test/...`` the value
  recorded last,
- ``mean``, ``std``: over the ``last`` values; the sample standard deviation (n - 1), blank for one run,
- ``best``, ``best_std``: the same over each run's best epoch. Blank for ``test/...``, since an epoch must not be chosen
  by its test value.

The best value is the smallest if a word of the metric's name is loss, ece, err, nll ... (``runs.LOWER``), and the
largest if one is acc, auc, precision, recall, f1 ... (``runs.HIGHER``); other names have no best. Words are separated
by ``/``, ``_`` and ``-``, and trailing digits do not count (``acc5`` is acc). Metrics of ``HIGHER`` with values in
[0, 1] are shown in percent; the CSV has fractions.
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
    """Run the command: print the tables, write ``compare.csv``, ``compare.md`` and ``compare.png``, print their paths.

    Raises:
        ValueError: if the arguments or the run folders cannot be used, or the files cannot be written.
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
        help="folder for the three files (default: the folder `compare` in the folder that holds all the runs)",
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
        raise ValueError(f"{output} cannot be written ({reason}); name another folder with --output.") from None
    for suffix in files:
        print(output / f"compare.{suffix}")


def _default_output(folders: Sequence[Path]) -> Path:
    common = Path(os.path.commonpath([folder.absolute().parent for folder in folders]))
    return (common.relative_to(Path.cwd()) if common.is_relative_to(Path.cwd()) else common) / "compare"
