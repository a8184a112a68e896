"""Weights from a file into a network."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_kd.core.checkpoint_files import check_checksums
from lightning_kd.core.feature_hooks import find_classifier
from lightning_kd.nets.ml_decoder import MLDecoderNetwork

# Where training programs keep the weights inside what they save.
_NESTS = ("state_dict", "model", "net", "network", "model_state_dict")
# Ours are saved as part of a task, under the name that the network has in it.
_PREFIXES = ("network.", "student.", "")
# Under which a network keeps the names of the classes that its weights were trained on.
_CLASSES = "classes_of_weights"


def load_weights(
    network: nn.Module, source: str | Path, num_classes: int | None = None, new_classifier: bool | None = None
) -> None:
    """Load the weights in a file into ``network``, in place; after an error the network is as it was.

    The file is a checkpoint of a task here (the network under ``network.`` or ``student.``, or its averaged copy where
    that answers; other parts are ignored), a plain state_dict, or what the public distillation programs save (the
    state_dict inside ``model``, ``state_dict`` or ``net``, the names perhaps after ``module.``). A ``.safetensors``
    file needs that package. Nothing but tensors and plain values is ever unpickled. The classes that a checkpoint was
    trained on are kept with the network, for ``other_classes``.

    Args:
        network: the network to load into; names and shapes must match exactly. Only ``num_batches_tracked``, which old
            files lack, may be missing.
        source: the file.
        num_classes: where given, the outputs that the classifier (the last ``nn.Linear``) must have.
        new_classifier: load all but the classifier (the last ``nn.Linear``, of an ``MLDecoderNetwork`` what its head
            has of each class, and what differs in its number of outputs alone), which stays as it is. With ``False`` a
            message about other classes names this argument; ``None`` is for callers that have none.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: where the file cannot be read safely, holds no state_dict, does not fit the network, has another
            number of classes, or has a value that is not finite.
        ImportError: where a ``.safetensors`` file is given and safetensors is not installed.
    """
    path = Path(source).expanduser()
    own = network.state_dict()
    content = _read(path)
    average_answers = isinstance(content, Mapping) and content.get("average_answers") is True
    weights = _matching(_state_dict(content, path), own, ("average.",) * average_answers + _PREFIXES)
    if new_classifier:
        classifiers = {*differing_classifiers(weights, own), *last_linear(network)}
        weights, own = (
            {key: value for key, value in part.items() if key.rpartition(".")[0] not in classifiers}
            for part in (weights, own)
        )
    _check(weights, own, path, type(network).__name__, remedy=new_classifier is not None)
    if num_classes is not None:
        _check_classes(network, num_classes, path)
    network.load_state_dict(weights, strict=False)  # checked above; strict would ask for num_batches_tracked
    network.__dict__[_CLASSES] = None if new_classifier else content.get("class_names")  # a new one knows none


def other_classes(network: nn.Module, data: Any) -> str | None:
    """Where the weights loaded into ``network`` were trained on other classes than those of ``data``: which one.

    Args:
        network: what ``load_weights`` loaded into.
        data: a data module; one without ``class_names`` is not looked at.

    Returns:
        What differs, such as ``class 0 was 'ant', here it is 'bee'``; ``None`` where nothing does, where the file did
        not say, and where the classes of either are called by plain numbers, which may mean anything.
    """
    stored, names = network.__dict__.get(_CLASSES), getattr(data, "class_names", None)
    if not stored or not names or any(all(name.isdecimal() for name in both) for both in (stored, names)):
        return None
    pairs = enumerate(zip_longest(stored[: len(names)], names))  # a data set may lack the last ones
    return next((f"class {k} was {was!r}, here it is {name!r}" for k, (was, name) in pairs if was != name), None)


def _read(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"weights {str(path)!r}: there is no such file; give a checkpoint or a state_dict file")
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError as error:
            raise ImportError(f"weights {str(path)!r} need safetensors: pip install safetensors") from error
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        check_checksums(path)
        # Public programs save their command line beside the weights; a Namespace runs no code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except Exception as error:  # damaged files raise anything from KeyError to zip errors
        raise ValueError(
            f"weights {str(path)!r} cannot be read: the file is damaged or holds objects other than tensors and plain "
            "values; save it again with torch.save(network.state_dict(), path)"
        ) from error


def _state_dict(content: Any, path: Path) -> dict[str, Any]:
    """What a file holds, out of its nesting and without the ``module.`` of parallel training."""
    while isinstance(content, Mapping):
        inner = next((content[nest] for nest in _NESTS if isinstance(content.get(nest), Mapping)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping) or not any(isinstance(value, Tensor) for value in content.values()):
        found = f"a dict of {list(content)[:3]}" if isinstance(content, Mapping) else f"a {type(content).__name__}"
        raise ValueError(
            f"weights {str(path)!r} hold no state_dict but {found}; "
            "save it again with torch.save(network.state_dict(), path)"
        )
    if all(str(key).startswith("module.") for key in content):
        return {str(key).removeprefix("module."): value for key, value in content.items()}
    return {str(key): value for key, value in content.items()}


def _matching(content: dict[str, Any], own: Mapping[str, Tensor], prefixes: Sequence[str]) -> dict[str, Any]:
    """The part of ``content`` that has most names in common with the network, under the network's own names."""
    parts = [
        {key.removeprefix(prefix): value for key, value in content.items() if key.startswith(prefix)}
        for prefix in prefixes
    ]
    # Among equals the first that is there, so that a task of another network is still recognised as a task.
    part = max((part for part in parts if part), key=lambda part: len(part.keys() & own.keys()))
    for name in ("weight", "bias"):  # the public mobilenetv2 has its classifier in a Sequential
        if f"classifier.{name}" in own and f"classifier.{name}" not in part and f"classifier.0.{name}" in part:
            part[f"classifier.{name}"] = part.pop(f"classifier.0.{name}")
    return part


def _check(
    weights: Mapping[str, Any], own: Mapping[str, Tensor], path: Path, network: str, remedy: bool = False
) -> None:
    missing = [key for key in own if key not in weights and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in weights if key not in own]
    if missing or unexpected:
        raise ValueError(
            f"weights {str(path)!r} do not fit the network {network}: {_some(missing)} missing, "
            f"{_some(unexpected)} unexpected; give weights of the same network"
        )
    strange = [key for key, value in weights.items() if not isinstance(value, Tensor)]
    if strange:
        raise ValueError(
            f"weights {str(path)!r}: {strange[0]} is a {type(weights[strange[0]]).__name__}, not a tensor; "
            "save it again with torch.save(network.state_dict(), path)"
        )
    different = [key for key, value in weights.items() if value.shape != own[key].shape]
    if different and len(differing_classifiers(weights, own)) == 1 == len({_layer(key) for key in different}):
        raise ValueError(
            f"weights {str(path)!r} has {len(weights[different[0]])} classes, the network has "
            f"{len(own[different[0]])}: give weights trained on the same classes"
            + ", or new_classifier: true to load all but the classifier"
            * remedy
        )
    if different:
        shapes = ", ".join(f"{key} {tuple(weights[key].shape)} for {tuple(own[key].shape)}" for key in different[:3])
        raise ValueError(
            f"weights {str(path)!r} do not fit the network {network}: {len(different)} shapes differ ({shapes}); "
            "give weights of the same network"
        )
    for key, value in weights.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"weights {str(path)!r}: {key} holds values that are not finite; give another file")


def _layer(key: str) -> str:
    return key.rpartition(".")[0]


def differing_classifiers(weights: Mapping[str, Any], own: Mapping[str, Tensor]) -> list[str]:
    """The layers that both have, and that differ in the number of their outputs only: those of other classes."""
    shared = [key for key, value in weights.items() if key in own and isinstance(value, Tensor)]
    different = [key for key in shared if weights[key].shape != own[key].shape]
    strange = {
        _layer(key)
        for key in different
        if not weights[key].dim() == own[key].dim() > 0 or weights[key].shape[1:] != own[key].shape[1:]
    }
    return [layer for layer in dict.fromkeys(map(_layer, different)) if layer not in strange]


def last_linear(network: nn.Module) -> list[str]:
    """The path of the classifier, where there is one."""
    if isinstance(network, MLDecoderNetwork):
        return ["head"]  # whose own queries, weights and biases are those of the classes
    try:
        return [find_classifier(network)[0]]
    except ValueError:  # a convolution, or a network of its own kind
        return []


def _check_classes(network: nn.Module, num_classes: int, path: Path) -> None:
    try:
        with_decoder = isinstance(network, MLDecoderNetwork)  # whose last linear layer is none of classes
        classes = network.num_classes if with_decoder else find_classifier(network)[1].out_features
    except ValueError:  # no linear layer to ask
        return
    if classes != num_classes:
        raise ValueError(
            f"weights {str(path)!r} has {classes} classes, the data has {num_classes}: "
            "give a network and weights trained on the same classes"
        )


def _some(keys: list[str]) -> str:
    """``3 (a, b, c)``: the count and the first three."""
    return f"{len(keys)} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})" if keys else "0"
