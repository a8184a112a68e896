"""The results of the rounds of ``lightning-kd active`` against the number of labels."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from lightning_kd.file_writing import write_text, written_whole
from lightning_kd.pool.pool_record import UNKNOWN, PoolRecord

__all__ = ["curves", "draw_curves", "table", "write_metrics"]


def curves(record: PoolRecord) -> list[dict[str, Any]]:
    """The results of the rounds of ``lightning-kd active``, one dict for each round.

    Its entries: ``round``, from 0; ``labels``, number of answers before the round was trained; ``known`` and
    ``unknown``, number of labelled samples of known classes and of samples answered "unknown" that it was trained on;
    ``test/...``, its test metrics. A round that made a query also has ``query/precision``, the share of known classes
    in the query's answers, and, if the number of all training samples of known classes is recorded, ``query/recall``,
    the share of these that is labelled after the query.
    """
    rows = []
    bought = 0
    for result in record.results:
        number = result["round"]
        answers = [row["answer"] for row in record.queries if row["round"] == number and row["answer"] is not None]
        row = {"round": number, "labels": bought, "known": result["known"], "unknown": result["unknown"]}
        row |= {name: value for name, value in result.items() if name.startswith("test/")}
        if answers:
            valid = sum(answer != UNKNOWN for answer in answers)
            row["query/precision"] = valid / len(answers)
            if result.get("known_total"):
                row["query/recall"] = (result["known"] + valid) / result["known_total"]
        bought += len(answers)
        rows.append(row)
    return rows


def write_metrics(record: PoolRecord, path: Path) -> None:
    """Write the curves as ``metrics.csv``, with the round as ``epoch`` and the number of answers as ``step``.

    ``curve/acc`` repeats ``test/acc``, because ``lightning-kd compare`` uses only the last row of ``test/...``.
    ``test/acc_mean`` is the mean of ``test/acc`` over the rounds so far, the area under the curve.
    """
    rows: list[dict[str, Any]] = []
    accuracies: list[float] = []
    for row in curves(record):
        accuracies.append(row.get("test/acc", float("nan")))
        values = {name: value for name, value in row.items() if "/" in name}
        values |= {"pool/known": row["known"], "pool/unknown": row["unknown"]}
        values["curve/acc"] = accuracies[-1]
        values["test/acc_mean"] = sum(accuracies) / len(accuracies)
        rows.append({"epoch": row["round"], "step": row["labels"], **values})
    names = sorted({name for row in rows for name in row} - {"epoch", "step"})
    text = io.StringIO()
    writer = csv.DictWriter(text, ["epoch", "step", *names], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue(), durable=True)


def table(rows: list[dict[str, Any]]) -> str:
    """The results of ``curves`` as a table of text."""
    heads = ["round", "labels", "known", "unknown", "accuracy", "precision", "recall"]
    names = ["round", "labels", "known", "unknown", "test/acc", "query/precision", "query/recall"]
    cells = [heads]
    for row in rows:
        shares = ["" if name not in row else f"{row[name]:.2%}" for name in names[4:]]
        cells.append([*(str(row[name]) for name in names[:4]), *shares])
    widths = [max(len(line[k]) for line in cells) for k in range(len(heads))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells
    )


def draw_curves(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draw accuracy, precision and recall against the number of labels into the PNG file ``path``."""
    from matplotlib.figure import Figure

    panels = [("test/acc", "test accuracy"), ("query/precision", "query precision"), ("query/recall", "recall")]
    figure = Figure(figsize=(10, 3), layout="constrained")
    for axes, (name, label) in zip(figure.subplots(1, 3), panels, strict=True):
        points = [(row["labels"], row[name]) for row in rows if name in row]
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3) if points else None
        axes.set(xlabel="labels bought", title=label)
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    with written_whole(path) as part:
        figure.savefig(part, format="png", dpi=120)
