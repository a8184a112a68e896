"""Runs a command of a page in seconds: two short epochs of the smallest network on made-up data."""

from __future__ import annotations

import csv
import functools
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
from PIL import Image

from lightning_kd.cli import main
from lightning_kd.cli.class_help import help_request
from lightning_kd.cli.config_names import config_names
from lightning_kd.cli.named_classes import find_class
from lightning_kd.cli.usage import VERBS
from lightning_kd.data import OpenSetDataModule
from tests.docs.option_check import flags_of
from tests.forked import run_command, run_forked

QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
ONE_PROCESS = ["--trainer.accelerator", "cpu", "--trainer.devices", "1"]
SHORT_OPTIONS = {  # of verbs that work on a finished run
    "sharpness": ["--samples", "20", "--max_probes", "2", "--points", "3"],
}
_RUN = re.compile(r"runs/[\w.*?-]+")


def make_files(folder: Path) -> None:
    """Make the files that the pages assume: photos and tables of labels."""
    rng = np.random.default_rng(0)
    classes = ("cat", "cow", "dog", "fox", "hen", "owl")  # more than the five that a store of soft labels keeps
    for place in (*(f"photos/{name}" for name in classes), "photos_new", "photos_more", "unlabelled"):
        (folder / place).mkdir(parents=True)
        for number in range(10):
            Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(folder / place / f"{number}.png")
    tags = [f"{name}/{number}.png,{name}" for name in classes for number in range(10)]
    # eight of each ten are trained on; their own class is among the candidates
    given = [f"{item},{(item // 8 + more) % 6}" for item in range(48) for more in range(1 + item % 2)]
    crowd = [f"{item},{annotator},{item % 10}" for item in range(20) for annotator in ("ann", "bob")]
    tables = {
        "photos/labels.csv": ["file,labels", *tags],
        "corrections.csv": ["index,label", "0,cat", "1,dog"],
        "candidates.csv": ["item,label", *given],
        "crowd.csv": ["item,annotator,label", *crowd],
    }
    for name, lines in tables.items():
        (folder / name).write_text("\n".join(lines) + "\n")
    for number in range(200):  # the classes are read from the folders when the data module is built
        (folder / f"data/tiny-imagenet-200/train/n{number:03d}").mkdir(parents=True)


def run(words: Sequence[str], settings: dict[str, Any], folder: Path) -> str:
    """Run a command in ``folder``; returns its output if it failed, else an empty text.

    Args:
        words: those after ``lightning-kd``.
        settings: those of its configs, as ``check`` gives them.
        folder: with what earlier commands of the page have left.
    """
    words = _with_runs(words, folder)
    if words[0] == "label":
        _answer(folder / words[1])
    done = run_forked(main, smoke(words, settings, folder), folder=folder, timeout=600)
    return "" if done.returncode == 0 else f"{done.stdout[-500:]}{done.stderr[-2000:]}"


def smoke(words: Sequence[str], settings: dict[str, Any], folder: Path) -> list[str]:
    """The words, followed by options that make the run short."""
    verb, *rest = words
    if (
        help_request([*rest, ""])
        or "--help" in rest
        or (VERBS[verb].light and verb != "claim")
        or VERBS[verb].standalone
    ):
        return [*words]
    if verb == "claim":
        named = [word for word in rest[:1] if word != "list"]
        # the options are those of each setting, and only BUAL's config has 20 epochs of negative learning
        longer = ["--trainer.max_epochs", "21"] if named == ["bual"] else []
        return [*words, *(["--seeds", "1", "--config", "_overlay/smoke", *longer] if named else [])]
    given = dict(flags_of(rest))
    configs = [value for name, value in flags_of(rest) if name == "config"]
    added = [*QUIET, *SHORT_OPTIONS.get(verb, [])]
    if "trainer.max_epochs" in given:
        added += ["--trainer.max_epochs", "3" if "ckpt_path" in given else "2"]
    if verb == "fit" and not {"ckpt_path", "overwrite", "print_config"} & {*given}:
        added += ["--overwrite", "true"]  # another block of the page may have made the run
    if not {*configs} & {*config_names()}:
        return [*words, *added]
    model = _small_model(settings, given, folder)
    return [*words, "--config", "_overlay/smoke", *added, *ONE_PROCESS, *model, *_small_data(settings, given)]


def _small_model(settings: dict[str, Any], given: dict[str, str], folder: Path) -> list[str]:
    model = settings.get("model", {}).get("init_args", {})
    values = {**model, **{name.removeprefix("model."): value for name, value in given.items()}}
    pixels = "Segmentation" in str(settings) or "CamVid" in str(settings) or "Cityscapes" in str(settings)
    words: list[str] = []
    for key in ("network", "student", "teacher"):
        if values.get(key) is not None:
            head = "+ml_decoder_16" if "+ml_decoder" in str(values[key]) else ""
            words += [f"--model.{key}", ("fcn_tiny" if pixels else "cnn_tiny") + head]
    for key, other in (("teacher_weights", "random"), ("student_weights", "null"), ("weights", "null")):
        value = values.get(key)
        if value is not None and not (isinstance(value, str) and (folder / value).is_file()):
            words += [f"--model.{key}", other]
            if other == "null" and values.get("freeze"):
                words += ["--model.freeze", "null"]  # no weights are loaded that could be frozen
    for key in ("warmup_epochs", "negative_epochs", "snapshot_interval"):
        if key in values:
            words += [f"--model.{key}", "1"]
    return words


def _small_data(settings: dict[str, Any], given: dict[str, str]) -> list[str]:
    name = settings["data"]["class_path"]
    pool = issubclass(find_class("data", name), OpenSetDataModule)
    source, words = settings["data"].get("init_args", {}), []
    if pool:
        words = ["--data.rounds", "1" if source.get("rounds") == 1 else "2"]
        source = source.get("source", {}).get("init_args", {})
    prefix = "--data.source." if pool else "--data."
    words += [f"{prefix}batch_size", "8"]
    if source.get("num_workers"):
        words += [f"{prefix}num_workers", "0"]
    if given.get(f"{prefix[2:]}root") == "photos" and "Segmentation" not in name:
        words += ["--data.fake", "false"]  # the photos exist
        words += ["--data.budget", "4"] if pool else []  # of the ten images in the pool
    return words


def _with_runs(words: Sequence[str], folder: Path) -> list[str]:
    """Expand patterns, and put a finished run where the reader is assumed to have one."""
    made = words[words.index("--run") + 1] if "--run" in words else None
    found: list[str] = []
    for word in words:
        for name in {*_RUN.findall(word)} - {made}:
            some = sorted(folder.glob(name))
            if not some and "weights" not in (found[-1] if found else ""):
                some = [folder / re.sub(r"[*?]", "0", name)]
                shutil.copytree(finished_run(), some[0])
        patterned = re.fullmatch(r"runs/[^/]*[*?][^/]*", word)
        found += [str(path.relative_to(folder)) for path in sorted(folder.glob(word))] if patterned else [word]
    return found


@functools.cache
def finished_run() -> Path:
    """The folder of a short fit."""
    folder = Path(mkdtemp())
    words = ["fit", "--config", "distillation/student_digits", "--config", "_overlay/smoke", *QUIET, "--run", "run"]
    done = run_command(*words, folder=folder)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def _answer(path: Path) -> None:
    """Fill in the column ``label`` of a query, as a person does."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = [row["predicted"] for row in rows]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows({**row, "label": name} for row, name in zip(rows, names, strict=True))
