"""The commands that a method's page shows for a config, those before it included."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from config_texts import first_line, is_complete, settings_of  # beside this file

import lightning_kd
from lightning_kd.active_learning.pool_task import PoolTask
from lightning_kd.cli.config_names import config_names
from lightning_kd.distillation import FKD
from lightning_kd.nets import network_names

_AFTER = {"flatness/with_shift": "flatness/sgd_digits"}  # the method's own configs shift already
_FOLDER = " --data.root photos"


def commands(name: str, configs: Sequence[str]) -> list[str]:
    """What is typed for a config of a method: first what makes the runs and stores that it starts from.

    Args:
        name: the config; one that is no whole is added to another.
        configs: all of the method.
    """
    if not is_complete(name):
        whole = _AFTER.get(name) or next(other for other in configs if is_complete(other))
        start = re.search(r"(--\S+) RUN/(\S+)", first_line(name))  # weights of the run before
        before = commands(whole, configs) if start else []
        weights = f" {start[1]} runs/{whole.rpartition('/')[2]}/{start[2]}" if start else ""
        return [*before, f"lightning-kd fit --config {whole} --config {name}{weights}"]
    settings = settings_of(name)
    method = getattr(lightning_kd, settings["model"]["class_path"].rpartition(".")[2])
    verb = "active" if issubclass(method, PoolTask) else "fit"
    own = f"--config {name}{_FOLDER if name.endswith('_folder') else ''}"
    first = [fit for run in _runs_in(settings["model"]) if (fit := _fit_of(run, name))]
    if issubclass(method, FKD):
        views = " --views 200 --compress marginal_smoothing_k5" if name.endswith("_folder") else ""
        first.append(f"lightning-kd teach {own}{views}")
        own += f" --model.teacher_store {Path(settings['model']['init_args']['teacher_weights']).with_suffix('.store')}"
    return [*first, f"lightning-kd {verb} {own}"]


def _runs_in(settings: Any) -> list[str]:
    """The names of the run folders that the settings want."""
    if isinstance(settings, dict):
        settings = list(settings.values())
    if isinstance(settings, list):
        return list(dict.fromkeys(found for value in settings for found in _runs_in(value)))
    return [settings.split("/")[1]] if isinstance(settings, str) and settings.startswith("runs/") else []


def _fit_of(run: str, name: str) -> str | None:
    """The command that makes a run which the config ``name`` starts from."""
    whole, _, seed = run.partition("_seed")
    same = sorted(found for found in config_names() if found.rpartition("/")[2] == whole)
    family = name.rpartition("/")[0]  # that of its own family where several have one
    same.sort(key=lambda other: other.rpartition("/")[0] != family)
    if same and same[0] != name:
        folder = _FOLDER if whole.endswith("_folder") else ""
        return f"lightning-kd fit --config {same[0]}{folder}" + (
            f" --seed_everything {seed} --run runs/{run}" if seed else ""
        )
    network = re.fullmatch(r"(?:teacher|student)_(\w+)", run)
    if network and network[1] in network_names():
        alone = "lightning-kd fit --config distillation/classification_cifar100"
        return f"{alone} --model.network {network[1]} --run runs/{run}"
    return None
