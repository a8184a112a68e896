"""Building the task of a finished run with its weights, without the training data and without a Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from jsonargparse import ArgumentError
from lightning.pytorch.cli import LightningArgumentParser
from torch import Tensor

from lightning_kd.core import problems
from lightning_kd.core.batch import as_batch
from lightning_kd.core.checkpoint_files import read_checkpoint
from lightning_kd.core.registry import family_packages
from lightning_kd.core.run_folder import RunFolder
from lightning_kd.core.starting_weights import leave_teacher_out, weights_from_checkpoint
from lightning_kd.core.task import Task
from lightning_kd.data.preparation import of_older_checkpoint

__all__ = ["load_trained", "test_images"]


class _Described:
    """Stands for the data module, from which a task gets problem, number of classes and input shape."""

    def __init__(self, problem: str, num_classes: int, input_shape: list[int]) -> None:
        self.problem = getattr(problems, problem)(num_classes)
        self.num_classes = num_classes
        self.input_shape = tuple(input_shape)


def load_trained(run: str | Path) -> tuple[Task, dict[str, Any], Path]:
    """Load the task of a run.

    Args:
        run: a run folder, of which ``best.ckpt`` is loaded, or ``last.ckpt`` if there is no best; or a checkpoint in a
            run folder.

    Returns:
        ``(task, description, checkpoint)``: the task on the CPU, in eval mode; the description of its data (class
        names, normalisation and so on); and the path of the checkpoint.

    Raises:
        FileNotFoundError: if there is no checkpoint, or no ``config.yaml`` of its run.
        ValueError: if one is damaged, or the two do not fit.
    """
    path = Path(run)
    if path.is_dir():
        folder = RunFolder(path)
        path = folder.best if folder.best.is_file() else folder.last
        if not path.is_file():
            raise FileNotFoundError(f"run {str(run)!r} holds no checkpoint: name the folder of a run, or a checkpoint")
    elif not path.exists():
        raise FileNotFoundError(f"run {str(run)!r} does not exist: name the folder of a run, or a checkpoint in one")
    checkpoint = read_checkpoint(path)
    config = _settings(path.absolute().parent.parent / "config.yaml")
    family_packages()  # so that their classes are found by name
    description = checkpoint.get("data_description") or {}
    if not hasattr(problems, str(description.get("problem"))):  # an old checkpoint, or a user's own kind of problem
        task, description = _with_data(config)
        description["class_names"] = checkpoint.get("class_names") or description["class_names"]
    else:
        task = _without_data(config, description)
        description = of_older_checkpoint(description, (config.get("data") or {}).get("init_args") or {})
    task.on_load_checkpoint(checkpoint)  # first, as in Lightning: it may add entries to the state_dict
    try:
        task.load_state_dict(checkpoint["state_dict"], strict=task.strict_loading)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit the config.yaml of its run ({error}): give those of one run") from error
    return task.eval(), description, path


def test_images(checkpoint: Path, count: int) -> tuple[Tensor, str] | None:
    """Some images of the prediction split of a checkpoint's run, and a description of them.

    Args:
        checkpoint: the checkpoint in a run folder.
        count: largest number of images.

    Returns:
        ``(images, description)``, images float32 ``[N, C, H, W]`` of 0 to 1; ``None`` if the data do not exist. Nothing
        is downloaded.
    """
    settings = _settings(checkpoint.absolute().parent.parent / "config.yaml").get("data")
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_lightning_class_args(L.LightningDataModule, "data", subclass_mode=True)
    try:
        data = parser.instantiate_classes(parser.parse_object({"data": settings})).data
        data.setup("predict")
        batch = as_batch(next(iter(data.predict_dataloader())))
    except (OSError, ValueError, TypeError, ArgumentError, StopIteration):  # the files do not exist any more
        return None
    shape = (-1, *[1] * (batch.image.ndim - 2))
    mean, std = (torch.tensor(values).view(shape) for values in (data.mean, data.std))
    image = batch.image[:count].float() * std + mean
    features = image.ndim == 2
    return (
        image if features else image.clamp(0, 1)
    ), f"the {'pool' if hasattr(data, 'source') else 'test set'} of the run"


def _settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}, which names the network: give a checkpoint in its run folder")
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({' '.join(str(error).split())}): put back a copy") from error
    if not isinstance(found, dict) or not isinstance(found.get("model"), dict):
        raise ValueError(f"{path} is no config of a run, as it has no model: put back a copy")
    leave_teacher_out(found["model"].setdefault("init_args", {}))
    return found


def _parser() -> LightningArgumentParser:
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_lightning_class_args(Task, "model", subclass_mode=True)
    return parser


def _instantiate(parser: LightningArgumentParser, settings: dict[str, Any]) -> Any:
    for name in ("num_classes", "input_shape", "problem"):
        parser.link_arguments(f"data.{name}", f"model.init_args.{name}", apply_on="instantiate")
    with torch.random.fork_rng(devices=[]), weights_from_checkpoint():  # the initial weights are replaced afterwards
        return parser.instantiate_classes(parser.parse_object(settings))


def _without_data(config: dict[str, Any], description: dict[str, Any]) -> Task:
    parser = _parser()
    parser.add_class_arguments(_Described, "data")
    data = {
        "problem": description["problem"],
        "num_classes": len(description["class_names"]),
        "input_shape": list(description["input_shape"]),
    }
    task: Task = _instantiate(parser, {"model": config["model"], "data": data}).model
    return task


def _with_data(config: dict[str, Any]) -> tuple[Task, dict[str, Any]]:
    parser = _parser()
    parser.add_lightning_class_args(L.LightningDataModule, "data", subclass_mode=True)
    made = _instantiate(parser, {"model": config["model"], "data": config.get("data")})
    data = made.data
    if hasattr(data, "describe"):
        return made.model, data.describe()
    known = {name: getattr(data, name, None) for name in ("class_names", "input_shape", "mean", "std")}
    return made.model, known
