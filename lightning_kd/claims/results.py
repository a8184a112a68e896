"""The results of a claim's runs, as JSON, as Markdown and as a picture."""

from __future__ import annotations

import io
import math
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lightning_kd.claims.claim_file import Claim
from lightning_kd.claims.kept_runs import record_of
from lightning_kd.claims.verdicts import Verdict, judge
from lightning_kd.compare import direction
from lightning_kd.compare.runs import read_run

__all__ = ["Results", "read_results", "to_json", "to_markdown", "to_png"]

_COLOR, _GREY = "#0072B2", "#666666"


@dataclass(frozen=True)
class Results:
    """The results of a claim's finished runs.

    Attributes:
        claim: the claim.
        seeds: seeds of the runs.
        values: for each compared setting its metric, one value for each seed.
        verdicts: one for each expectation.
        versions: versions of the packages, by name; joined by "and" if runs differ.
        machine: the kind of machine.
    """

    claim: Claim
    seeds: tuple[int, ...]
    values: dict[str, list[float]]
    verdicts: list[Verdict]
    versions: dict[str, str]
    machine: str

    @property
    def percent(self) -> bool:
        """Whether the metric is shown in percent: larger is better, and all values are in [0, 1]."""
        values = [value for of_one in self.values.values() for value in of_one if math.isfinite(value)]
        return direction(self.claim.metric) > 0 and all(0 <= value <= 1 for value in values)


def read_results(claim: Claim, seeds: Sequence[int], folder: Path) -> Results:
    """Read the results of the runs below ``folder``.

    Raises:
        ValueError: if a compared run has not recorded the metric.
    """
    compared = dict.fromkeys(name for one in claim.expected for name in (one.first, one.second))
    versions: dict[str, set[str]] = {"python": {platform.python_version()}}
    values: dict[str, list[float]] = {}
    for setting in (name for name in claim.settings if name in compared):
        for seed in seeds:
            run = read_run(folder / claim.run_name(setting, seed))
            value = run.last(claim.metric)
            if value is None:
                known = ", ".join(sorted(run.series)) or "nothing"
                raise ValueError(f"{run.path} has no {claim.metric}; recorded are {known}: correct the claim's metric")
            values.setdefault(setting, []).append(value)
            for package, version in record_of(run.path).get("versions", {}).items():
                versions.setdefault(package, set()).add(version)
    joined = {package: " and ".join(sorted(found)) for package, found in versions.items()}
    verdicts = [judge(one, values) for one in claim.expected]
    return Results(claim, tuple(seeds), values, verdicts, joined, machine())


def machine() -> str:
    """The operating system, the processor and the number of cores, in a few words."""
    model = platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        model = names[0] if names else model
    except OSError:
        pass
    return f"{platform.system()}, {model}, {os.cpu_count()} cores, one thread a run"


def to_json(results: Results) -> dict[str, Any]:
    """The content of ``claim.json``; numbers that are not finite are ``None``."""
    claim = results.claim
    settings = {
        name: {
            "commands": list(claim.settings[name]),
            "mean": _number(float(np.mean(values))),
            "std": _number(float(np.std(values, ddof=1))) if len(values) > 1 else None,
            "values": [_number(value) for value in values],
        }
        for name, values in results.values.items()
    }
    expected = [
        {
            "expected": str(one.expectation),
            "verdict": one.verdict,
            "difference": _number(one.mean),
            "interval": [_number(one.low), _number(one.high)],
            "differences": [_number(value) for value in one.differences],
        }
        for one in results.verdicts
    ]
    return {
        "name": claim.name,
        "claim": claim.sentence,
        "source": claim.source,
        "tried": claim.tried,
        "metric": claim.metric,
        "percent": results.percent,
        "seeds": list(results.seeds),
        "settings": settings,
        "expected": expected,
        "versions": results.versions,
        "machine": results.machine,
    }


def to_markdown(results: Results) -> str:
    """The content of ``claim.md``: a table of the settings and one of the expectations."""
    claim = results.claim
    unit = " %" if results.percent else ""
    scale = 100 if results.percent else 1
    settings = [["setting", "n", f"mean{unit}", f"std{unit}", "each seed"]]
    for name, values in results.values.items():
        shown = [f"{scale * value:.4g}" for value in values]
        std = _shown(scale * np.std(values, ddof=1)) if len(values) > 1 else ""
        settings.append([name, str(len(values)), _shown(scale * np.mean(values)), std, ", ".join(shown)])
    expected = [["expected", f"difference{unit}", "95 % interval", "verdict"]]
    for one in results.verdicts:
        interval = f"{_signed(scale * one.low)} to {_signed(scale * one.high)}" if math.isfinite(one.low) else ""
        expected.append([str(one.expectation), _signed(scale * one.mean), interval, one.verdict])
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    seeds = ", ".join(map(str, results.seeds))
    parts = [f"# {claim.name}", claim.sentence, f"Source: {claim.source}"]
    parts += [f"{claim.metric}, last value, seeds {seeds}:", _table(settings), _table(expected)]
    parts += [claim.tried] if claim.tried else []
    return "\n\n".join([*parts, f"Made with {versions} on {results.machine}."]) + "\n"


def to_png(results: Results) -> bytes:
    """The picture as PNG: a row for each expectation, with the paired differences, their mean and its interval."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    verdicts = results.verdicts
    scale = 100 if results.percent else 1
    figure = Figure(figsize=(8, 1.6 + 0.6 * len(verdicts)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.axvline(0, color=_GREY, linewidth=1)
    for row, one in enumerate(verdicts):
        points = scale * np.array(one.differences)
        axes.plot(points, np.full(len(points), row), "o", color=_GREY, alpha=0.5, markersize=4)
        half = scale * (one.high - one.mean)
        error = [[half], [half]] if math.isfinite(half) else None
        axes.errorbar([scale * one.mean], [row + 0.2], xerr=error, fmt="D", color=_COLOR, capsize=4)
    axes.set_yticks(range(len(verdicts)), [f"{one.expectation}\n{one.verdict}" for one in verdicts])
    axes.set_ylim(len(verdicts) - 0.4, -0.6)
    unit = " in %" if results.percent else ""
    axes.set_xlabel(f"{results.claim.metric}{unit}: first minus second, each seed, mean and 95 % interval")
    axes.grid(axis="x", alpha=0.3)
    data = io.BytesIO()
    figure.savefig(data, format="png", metadata={"Software": None})
    return data.getvalue()


def _number(value: float) -> float | None:
    return float(f"{value:.7g}") if math.isfinite(value) else None


def _shown(value: float) -> str:
    return f"{value:.2f}" if abs(value) >= 0.1 or value == 0 else f"{value:.3g}"


def _signed(value: float) -> str:
    return ("+" if value >= 0 else "") + _shown(value)


def _table(rows: list[list[str]]) -> str:
    widths = [max(3, *map(len, cells)) for cells in zip(*rows, strict=True)]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" for line in lines)
