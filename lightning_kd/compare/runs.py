"""Reading run folders: the configuration without seeds, and the metrics by epoch."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

HIGHER = frozenset(
    ["acc", "accuracy", "ap", "auc", "auroc", "cf", "f1", "iou", "map", "miou", "of", "precision", "recall", "top"]
)
#: the metrics by which tasks choose ``best.ckpt``, for each kind of problem
MONITORED = ("acc", "map", "miou")
LOWER = frozenset(["brier", "ece", "err", "error", "loss", "mae", "mse", "nll", "rmse"])

_NOT_COMPARED = ("seed_everything", "run", "overwrite", "ckpt_path", "trainer.default_root_dir", "trainer.logger")
# the C loader, if there is one, is ten times faster
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass
class Run:
    """The content of one run folder.

    Attributes:
        path: the folder.
        seed: ``seed_everything``; ``None`` if there is none.
        outcome: outcome of the last ``fit`` or ``active``, such as ``finished``.
        settings: the config without its seeds, flat: ``model.init_args.heads`` -> 2.
        seeds: all seeds of the config; runs of one group with equal seeds are repetitions of the same run.
        series: metric -> epoch -> value; for ``test/...`` only the value recorded last.
        epochs: number of epochs with metrics.
    """

    path: Path
    seed: int | None
    outcome: str
    settings: dict[str, Any]
    seeds: tuple[str, ...]
    series: dict[str, dict[int, float]]
    epochs: int

    @property
    def finished(self) -> bool:
        return self.outcome == "finished"

    @property
    def stem(self) -> str:
        """The folder's name without the seed at its end; the parent's name if it is nothing but a seed."""
        path = self.path.absolute()
        # only a number that is the run's seed: resnet_56 keeps its depth
        return re.sub(rf"(^|[-_]+)((seed|s)[-_=]?)?0*{self.seed}$", "", path.name, flags=re.I) or path.parent.name

    @property
    def name(self) -> str:
        path = self.path.absolute()
        return f"{path.parent.name}/{path.name}" if self.stem == path.parent.name else path.name

    def last(self, metric: str) -> float | None:
        values = self.series.get(metric)
        return values[max(values)] if values else None

    def best(self, metric: str) -> float | None:
        sign = direction(metric)
        values = [value for value in self.series.get(metric, {}).values() if not math.isnan(value)]
        if metric.startswith("test/") or not sign or not values:
            return None
        return max(values) if sign > 0 else min(values)


def direction(metric: str) -> int:
    """1 if larger values of the metric are better, -1 if smaller ones are, 0 if the name does not tell."""
    words = re.split(r"[^a-z0-9]+", metric.lower())
    words += [word.rstrip("0123456789") for word in words]
    return -1 if LOWER.intersection(words) else 1 if HIGHER.intersection(words) else 0


def expand(paths: Iterable[str | Path]) -> tuple[list[Path], list[str]]:
    """The run folders among ``paths``, and a line for each folder that was left out.

    A folder that is no run folder itself stands for the run folders directly in it. A folder named twice counts once.

    Raises:
        ValueError: for a path that is no folder, or without any run folder.
    """
    found: dict[Path, Path] = {}
    left_out: list[str] = []
    for path in map(Path, paths):
        if not path.is_dir():
            raise ValueError(f"{path} is not a folder; name run folders, or a folder of run folders.")
        if _is_run(path):
            found.setdefault(path.resolve(), path)
            continue
        children = [child for child in sorted(path.iterdir()) if _is_run(child)]
        if not children:
            raise ValueError(f"{path} is not a run folder (it has no config.yaml), nor is any folder directly in it.")
        for child in children:
            if missing := _missing(child):
                left_out.append(f"left out: {child} (no {missing})")
            else:
                found.setdefault(child.resolve(), child)
    if not found:
        raise ValueError(f"No run to compare: {'; '.join(left_out)}.")
    return list(found.values()), left_out


def read_run(path: Path) -> Run:
    """Read a run folder.

    Raises:
        ValueError: if a file is missing or damaged.
    """
    if missing := _missing(path):
        raise ValueError(f"{path} has no {missing}, so it cannot be compared; leave it out, or run it first.")
    config = _load(path / "config.yaml", _yaml)
    seed = config.get("seed_everything")
    seed = seed if type(seed) is int else None
    record = _load(path / "run.json", json.loads) if (path / "run.json").is_file() else {}
    entries = [*record.get("history", []), record]
    fits = [entry.get("outcome") for entry in entries if entry.get("verb") in ("fit", "active")]
    settings, seeds = _settings(config, path, ())
    series = _read_metrics(path / "metrics.csv")
    epochs = max((max(values) + 1 for name, values in series.items() if not name.startswith("test/")), default=0)
    outcome = str(fits[-1]) if fits else "no record of a fit"
    return Run(path, seed, outcome, settings, (str(seed), *seeds), series, epochs)


def _is_run(path: Path) -> bool:
    return any((path / name).is_file() for name in ("config.yaml", "run.json", "metrics.csv"))


def _missing(path: Path) -> str:
    return " and no ".join(name for name in ("config.yaml", "metrics.csv") if not (path / name).is_file())


def _yaml(text: str) -> Any:
    return yaml.load(text, Loader=_LOADER)


def _load(path: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    try:
        content = parse(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it holds no settings")
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is damaged ({reason}); leave the run out, or run it again.") from None
    return content


def _read_metrics(path: Path) -> dict[str, dict[int, float]]:
    """Metric -> epoch -> the last value recorded in that epoch, from ``metrics.csv``."""
    series: dict[str, dict[int, float]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        for row in reader:
            try:
                epoch = int(float(row.pop("epoch")))
                for name, cell in row.items():
                    if cell and name != "step":
                        series.setdefault(name, {})[0 if name.startswith("test/") else epoch] = float(cell)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise ValueError(f"{path} is damaged in line {reader.line_num} ({error}); leave the run out.") from None
    return series


def _settings(config: dict[str, Any], path: Path, students: tuple[Path, ...]) -> tuple[dict[str, Any], list[str]]:
    """The flat config of the run folder ``path`` without settings that may differ between seeds, and the data's seeds.

    ``students`` are the runs whose teacher this one is, so that a circle of runs ends.
    """
    kept: dict[str, Any] = {}
    seeds: list[str] = []
    for key, value in flat(config).items():
        if f"{key}.".startswith(tuple(f"{name}." for name in _NOT_COMPARED)):
            continue
        if key.startswith("data.") and key.endswith((".seed", ".split_seed")):
            seeds.append(str(value))
        elif key.endswith(".teacher_weights") and isinstance(value, str | list):
            listed = isinstance(value, list)
            for k, one in enumerate(value if listed else [value]):
                found = _teacher(one, path, students) if isinstance(one, str) else {"": one}
                own = f"{key}.{k}" if listed else key
                kept |= {f"{own}.{name}" if name else own: v for name, v in found.items()}
        elif not isinstance(value, str):
            kept[key] = value
        else:  # paths in the run's own folder, such as those of callbacks, are compared without it
            kept[key] = value.removeprefix(f"{config.get('run')}/")
    return kept, seeds


def _teacher(weights: str, path: Path, students: tuple[Path, ...]) -> dict[str, Any]:
    """The settings of the run in whose folder the file ``weights`` is; the path itself if it is in none."""
    students = (*students, path.resolve())
    # a relative path is relative to the folder of the command: this one, or a folder above the run
    for base in (Path.cwd(), *path.resolve().parents):
        file = base / weights
        for folder in file.parents[:2]:  # RUN/network.pt or RUN/checkpoints/best.ckpt
            if (folder / "config.yaml").is_file() and folder.resolve() not in students:
                config = _load(folder / "config.yaml", _yaml)
                return {"file": str(file.relative_to(folder)), **_settings(config, folder, students)[0]}
    return {"": weights}


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings as a flat dict with dotted keys; a list of plain values is one value."""
    plain = isinstance(node, list) and not any(isinstance(value, dict | list) for value in node)
    if not node or plain or not isinstance(node, dict | list):
        return {prefix: node}
    found: dict[str, Any] = {}
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        found |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return found
