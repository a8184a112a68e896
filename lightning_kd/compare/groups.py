"""Grouping runs that differ only in seed, naming the groups and summarising their metrics."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lightning_kd.compare.runs import MONITORED, Run, expand, read_run


@dataclass
class Summary:
    """One metric over the runs of one group.

    Attributes:
        n: number of runs with the metric.
        mean: mean of their last values; ``None`` without any.
        std: sample standard deviation of the last values; ``None`` with fewer than 2.
        last: the last value of each run of the group; ``None`` for a run without the metric.
        best: mean of the best values; ``None`` for ``test/...`` and metrics without a known direction.
        best_std: sample standard deviation of the best values, likewise.
    """

    n: int
    mean: float | None
    std: float | None
    last: list[float | None]
    best: float | None
    best_std: float | None


@dataclass
class Group:
    """Runs that differ only in seed.

    Attributes:
        label: a short unique name.
        runs: the runs, ordered by seed.
        metrics: a summary for each metric by name.
        notes: sentences about unusual things, such as a seed that occurs twice.
    """

    label: str
    runs: list[Run]
    metrics: dict[str, Summary]
    notes: list[str]

    @property
    def seeds(self) -> list[str]:
        return ["?" if run.seed is None else str(run.seed) for run in self.runs]


def compare_runs(runs: Sequence[str | Path], metrics: Sequence[str] | None = None) -> list[Group]:
    """Group run folders that differ only in seed, in the given order, and summarise each metric.

    Two runs are in one group if their ``config.yaml`` are equal except for ``seed_everything``, ``run``, ``overwrite``,
    ``ckpt_path``, ``trainer.default_root_dir``, ``trainer.logger`` and every ``seed`` and ``split_seed`` under
    ``data``. If ``teacher_weights`` (or one of a list) is in a run folder, that run's config without its seeds is
    compared instead of the path, so that students whose teachers differ in seed are one group.

    Args:
        runs: run folders, or folders of run folders.
        metrics: names of metrics. Default: ``test/acc`` and ``val/acc``, as far as a run has them (or the same of
            ``map`` or ``miou``); else the first ``val/...``, else the first ``test/...``.

    Raises:
        ValueError: for folders that are no runs, damaged files, and metrics that no run has.
    """
    read = [read_run(path) for path in expand(runs)[0]]
    names = _choose_metrics(read, list(metrics or ()))
    members: dict[frozenset[tuple[str, str]], list[Run]] = {}
    for run in read:
        members.setdefault(frozenset((key, repr(value)) for key, value in run.settings.items()), []).append(run)
    groups = [sorted(group, key=lambda run: (run.seed is None, run.seed or 0)) for group in members.values()]
    return [
        Group(label, group, {name: _summary(group, name) for name in names}, _notes(group, names))
        for label, group in zip(_labels(groups), groups, strict=True)
    ]


def _choose_metrics(runs: list[Run], asked: list[str]) -> list[str]:
    known = list(dict.fromkeys(name for run in runs for name in run.series))
    recorded = f"recorded are {', '.join(known)}" if known else "no run has recorded any metric yet"
    for name in asked:
        if name not in known:
            raise ValueError(f"--metric {name}: no run has it; {recorded}.")
    usual = [f"{split}/{kind}" for kind in MONITORED for split in ("test", "val") if f"{split}/{kind}" in known][:2]
    first = [name for part in ("val/", "test/") for name in known if name.startswith(part)][:1]
    chosen = asked or usual or first
    if not chosen:
        raise ValueError(f"No run has a val/... or test/... metric; {recorded}; name one with --metric.")
    return list(dict.fromkeys(chosen))


def _summary(runs: list[Run], metric: str) -> Summary:
    last = [run.last(metric) for run in runs]
    values = [value for value in last if value is not None]
    best = [value for run in runs if (value := run.best(metric)) is not None]
    return Summary(len(values), *_mean_std(values), last, *_mean_std(best))


def _mean_std(values: Sequence[float]) -> tuple[float | None, float | None]:
    if not values:
        return None, None
    with np.errstate(invalid="ignore", over="ignore"):  # nan for a diverged run, which a note names
        return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def _notes(runs: list[Run], metrics: list[str]) -> list[str]:
    notes = []
    for seeds, count in Counter(run.seeds for run in runs if run.seed is not None).items():
        if count > 1:
            names = ", ".join(run.name for run in runs if run.seeds == seeds)
            notes.append(f"warning: seed {seeds[0]} occurs more than once ({names}); these are not independent repeats")
    if len({run.epochs for run in runs}) > 1:
        notes.append("the number of epochs differs: " + ", ".join(f"{run.name} {run.epochs}" for run in runs))
    for metric in metrics:
        if without := [run.name for run in runs if run.last(metric) is None]:
            notes.append(f"no {metric}: " + ", ".join(without))
        if broken := [run.name for run in runs if not math.isfinite(run.last(metric) or 0.0)]:
            notes.append(f"{metric} is not finite: " + ", ".join(broken))
    return notes


def _labels(groups: list[list[Run]]) -> list[str]:
    """A short and unique name for each group.

    It is the folder name of the runs without the seed if it is the same for all, else the name of the method. To groups
    with equal names, the settings in which they differ are added.
    """
    settings = [group[0].settings for group in groups]
    names = []
    for group in groups:
        stems = {run.stem for run in group}
        method = str(group[0].settings.get("model.class_path", "runs")).rsplit(".", 1)[-1]
        names.append(stems.pop() if len(stems) == 1 else method)
    labels = []
    for own, name in zip(settings, names, strict=True):
        peers = [other for other, same in zip(settings, names, strict=True) if same == name]
        labels.append(" ".join([name, *_differences(own, peers)]))
    return [
        f"{label} #{labels[: i + 1].count(label)}" if labels.count(label) > 1 else label
        for i, label in enumerate(labels)
    ]


def _differences(own: dict[str, Any], peers: list[dict[str, Any]]) -> list[str]:
    """``key=value`` for three differing settings, those of the model first; more if needed to tell the groups apart."""

    def split(keys: Sequence[str]) -> int:
        return len({tuple(repr(peer.get(key, "-")) for key in keys) for peer in peers})

    keys = [key for key in dict.fromkeys(key for peer in peers for key in peer) if split([key]) > 1]
    keys.sort(key=lambda key: not key.startswith("model."))
    chosen = keys[:3]
    for key in keys[3:]:
        if split([*chosen, key]) > split(chosen):
            chosen.append(key)
    short = [_short_key(key) for key in chosen]
    shown = [key if short.count(name) > 1 else name for key, name in zip(chosen, short, strict=True)]
    return [f"{name}={_short_value(key, own.get(key, '-'))}" for key, name in zip(chosen, shown, strict=True)]


def _short_key(key: str) -> str:
    parts = [part for part in key.split(".") if part not in ("class_path", "init_args") and not part.isdigit()]
    return f"teacher.{parts[-1]}" if "teacher_weights" in parts[:-1] else parts[-1]


def _short_value(key: str, value: Any) -> str:
    if isinstance(value, str):
        return value.rsplit("." if key.endswith("class_path") else "/", 1)[-1]
    return json.dumps(value, separators=(",", ":"), default=str)
