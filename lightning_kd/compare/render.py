"""Rendering groups of runs as CSV, as Markdown (which is also printed) and as a picture."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lightning_kd.compare.groups import Group
from lightning_kd.compare.runs import direction
from lightning_kd.spreadsheet import csv_text

# blue, vermilion, green, purple, orange, sky blue, black, grey: Okabe and Ito's colours, also for colour-blind readers
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
_LINES = ("-", "--", ":", "-.")
_COLUMNS = "group metric n mean std best best_std last seeds epochs runs unfinished"
_FOOT = (
    "mean and std: over runs of the value at the last epoch (sample standard deviation). "
    "best: the same over each run's best epoch."
)


def to_csv(groups: Sequence[Group]) -> str:
    """The CSV: one line for each group and metric, fractions (not percent) with seven digits, lists joined by ``;``."""

    def digits(values: Sequence[float | None]) -> list[str]:
        return ["" if value is None else f"{value:.7g}" for value in values]

    rows: list[list[Any]] = [_COLUMNS.split()]
    for metric in groups[0].metrics:
        for group in groups:
            s = group.metrics[metric]
            lists = [
                digits(s.last),
                group.seeds,
                [str(run.epochs) for run in group.runs],
                [str(run.path) for run in group.runs],
                [str(run.path) for run in group.runs if not run.finished],
            ]
            numbers = digits([s.mean, s.std, s.best, s.best_std])
            rows.append([group.label, metric, s.n, *numbers, *map(";".join, lists)])
    return csv_text(rows)


def to_markdown(groups: Sequence[Group], left_out: Sequence[str] = ()) -> str:
    """The Markdown: one table for each metric, then the notes.

    Args:
        groups: the groups.
        left_out: further notes, about folders that were left out.
    """
    parts = [f"### {metric}\n\n{_table(groups, metric)}" for metric in groups[0].metrics]
    unfinished = [f"{run.name} ({run.outcome})" for group in groups for run in group.runs if not run.finished]
    notes = ["unfinished (marked *): " + ", ".join(unfinished)] if unfinished else []
    notes += [f"{group.label}: {note}" for group in groups for note in group.notes] + [*left_out]
    parts += [_FOOT, "\n".join(f"- {note}" for note in notes)]
    return "\n\n".join(part for part in parts if part) + "\n"


def to_png(groups: Sequence[Group]) -> bytes:
    """The picture as PNG: a panel for each metric, with mean and std over the runs by epoch, a point for ``test/``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    metrics = list(groups[0].metrics)
    figure = Figure(figsize=(8, 4 * len(metrics) + 0.25 * len(groups)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    handles: dict[str, Any] = {}
    for axes, metric in zip(np.ravel(figure.subplots(len(metrics), 1)), metrics, strict=True):
        percent = _percent(groups, metric)
        scale = 100 if percent else 1
        for i, group in enumerate(groups):
            curves = [run.series.get(metric, {}) for run in group.runs]
            finite = {
                epoch: values
                for epoch in sorted(set().union(*curves))
                if (values := [scale * c[epoch] for c in curves if math.isfinite(c.get(epoch, math.nan))])
            }
            if not finite:
                continue
            x = list(finite)
            mean = np.array([np.mean(values) for values in finite.values()])
            std = np.array([np.std(values, ddof=1) if len(values) > 1 else 0.0 for values in finite.values()])
            color = _COLORS[i % len(_COLORS)]
            if metric.startswith("test/"):
                handle: Any = axes.errorbar(mean, [i], xerr=std, color=color, fmt="o", capsize=4)
            else:
                line = _LINES[i // len(_COLORS) % len(_LINES)]
                [handle] = axes.plot(x, mean, color=color, linestyle=line, marker=".")
                axes.fill_between(x, mean - std, mean + std, color=color, alpha=0.18, linewidth=0)
            handles[f"{group.label} (n={len(group.runs)})".replace("$", r"\$")] = handle
        name = f"{metric} (%)" if percent else metric
        if metric.startswith("test/"):
            axes.set(xlabel=name, yticks=[], ylim=(len(groups) - 0.5, -0.5))
        else:
            axes.set(xlabel="epoch", ylabel=name)
            axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", frameon=False)
    data = io.BytesIO()
    figure.savefig(data, format="png", metadata={"Software": None})
    return data.getvalue()


def _percent(groups: Sequence[Group], metric: str) -> bool:
    values = [value for group in groups for run in group.runs for value in run.series.get(metric, {}).values()]
    return direction(metric) > 0 and all(0 <= value <= 1 for value in values if math.isfinite(value))


def _table(groups: Sequence[Group], metric: str) -> str:
    """The table of one metric. Seeds of unfinished runs are marked by ``*``; without best values there is no column."""
    percent = _percent(groups, metric)
    has_best = any(group.metrics[metric].best is not None for group in groups)

    def show(value: float | None) -> str:
        return "" if value is None else f"{100 * value:.2f}" if percent else f"{value:.4f}"

    names = ["mean", "std", "best", "best std"] if has_best else ["mean", "std"]
    unit = " %" if percent else ""
    rows = [["run", "n", *(name + unit for name in names), "seeds", f"last{unit}"]]
    for group in groups:
        s = group.metrics[metric]
        seeds = [seed + ("" if run.finished else "*") for seed, run in zip(group.seeds, group.runs, strict=True)]
        numbers = [show(value) for value in (s.mean, s.std, s.best, s.best_std)[: len(names)]]
        last = [show(value) or "-" for value in s.last]
        rows.append([group.label.replace("|", "\\|"), str(s.n), *numbers, ", ".join(seeds), ", ".join(last)])
    columns = []
    for i, cells in enumerate(zip(*rows, strict=True)):
        width = max(3, *map(len, cells))
        right = 1 <= i <= 1 + len(names)
        padded = [cell.rjust(width) if right else cell.ljust(width) for cell in cells]
        columns.append([padded[0], "-" * (width - 1) + ":" if right else "-" * width, *padded[1:]])
    return "\n".join(f"| {' | '.join(row)} |" for row in zip(*columns, strict=True))
