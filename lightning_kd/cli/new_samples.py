"""Predicting new samples with what a checkpoint stores of the data, so that the training data need not exist."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

from jsonargparse import Namespace

from lightning_kd.core.checkpoint_files import read_checkpoint
from lightning_kd.core.run_folder import RunFolder
from lightning_kd.core.starting_weights import leave_teacher_out
from lightning_kd.data.described_samples import DescribedSamples
from lightning_kd.data.new_samples import is_array_file
from lightning_kd.data.preparation import of_older_checkpoint

__all__ = ["take_from_run", "without_predict"]

_FLAGS = ("--data.predict", "--data.init_args.predict")
# these have an argument predict themselves, for image files only
_OF_FILES = ("ImageFolderDataModule", "SegmentationFolderDataModule", "CamVidDataModule", "CityscapesDataModule")


def without_predict(words: Sequence[str]) -> tuple[list[str], str | None]:
    """The words of a command line without ``--data.predict``, which not every data module has, and its value."""
    left: list[str] = []
    given = None
    rest = iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        if name not in _FLAGS:
            left.append(word)
            continue
        words_of = [word] if equals else [word, *islice(rest, 1)]
        value = value if equals else "".join(words_of[1:])
        if value in ("", "null"):
            left += words_of  # the parser reports it, or takes it as None
        else:
            given = value
    return left, given


def take_from_run(config: Any, given: str | None, folder: RunFolder) -> None:
    """Change the settings of ``predict`` so that new samples are read as the training data were, in place.

    A data module of files with an argument ``predict`` gets the class names, mean and std of the checkpoint, unless
    it has values for them; others, and those of arrays, are replaced by ``DescribedSamples``. Without new samples the
    data are not changed. The teacher's weights are not loaded, as predictions do not use them.

    Args:
        config: the settings of ``predict``.
        given: the value of ``--data.predict``.
        folder: the run folder.

    Raises:
        ValueError: for a data module that cannot read new samples, if there is no checkpoint that describes the data.
    """
    if config.get("ckpt_path") in ("last", "best"):
        config["ckpt_path"] = str(folder.checkpoint(config["ckpt_path"]))
    if config.get("ckpt_path"):
        leave_teacher_out(config.model.get("init_args") or {})
    data = config.get("data") or {}
    arguments = data.get("init_args") or {}
    if given is not None and "predict" in arguments:
        arguments["predict"] = given
    given = arguments.get("predict") or given
    if given is None:
        return
    name = str(data.get("class_path")).rpartition(".")[2]
    known: dict[str, Any] = {}
    if config.get("ckpt_path"):
        checkpoint = read_checkpoint(config["ckpt_path"])
        known = checkpoint.get("data_description") or {"class_names": checkpoint.get("class_names")}
    reads = "predict" in arguments and not (known and name == "ArrayDataModule")
    if reads and not (known.get("input_shape") and name in _OF_FILES and is_array_file(given)):
        for key in ("class_names", "mean", "std", "kind"):
            if known and key in arguments and arguments[key] is None:
                arguments[key] = known.get(key)
    elif known.get("input_shape"):
        config["data"] = _described(arguments, known, given)
    elif "predict" not in arguments:
        raise ValueError(
            f"{name} cannot read predict={given!r} without a checkpoint that describes its data: add --ckpt_path best "
            "or last of a run"
        )


def _described(arguments: Any, known: dict[str, Any], given: str) -> Namespace:
    """The settings of ``DescribedSamples``; a user's own settings override those of the checkpoint."""
    source = (arguments.get("source") or {}).get("init_args") or arguments
    loading = {key: source[key] for key in ("eval_batch_size", "num_workers", "on_error") if key in source}
    own = {} if source is not arguments or arguments.get("normalize") is False else arguments
    changeable = ("class_names", "mean", "std", "background", "image_range")
    description = {
        **of_older_checkpoint(known, arguments),
        **{key: list(own[key]) for key in changeable if own.get(key) is not None},
    }
    path = f"{DescribedSamples.__module__}.{DescribedSamples.__name__}"
    return Namespace(class_path=path, init_args=Namespace(description=description, predict=given, **loading))
