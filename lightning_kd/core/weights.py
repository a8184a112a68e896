"""Loading weights from a file into a network."""

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

# keys under which training programs save the weights
_NESTS = ("state_dict", "model", "net", "network", "model_state_dict")
# names of the network in the checkpoints of tasks
_PREFIXES = ("network.", "student.", "")
# attribute of a network with the names of the classes that its weights were trained on
_CLASSES = "classes_of_weights"


def load_weights(
    network: nn.Module, source: str | Path, num_classes: int | None = None, new_classifier: bool | None = None
) -> None:
    """Load the weights in a file into ``network``, in place; after an error the network is unchanged.

    The file is a checkpoint of a task of lightning_kd (the network under ``network.`` or ``student.``, or its average
    if the task predicts with that; other parts are ignored), a plain state_dict, or a file of the public distillation
    programs (a state_dict under ``model``, ``state_dict`` or ``net``, with or without the prefix ``module.``). A
    ``.safetensors`` file needs the package safetensors. Nothing but tensors and plain values is unpickled. The names of
    the classes that a checkpoint was trained on are stored with the network, for ``other_classes``.

    Args:
        network: the network to load into; names and shapes must match exactly. Only ``num_batches_tracked``, which old
            files lack, may be missing.
        source: the file.
        num_classes: number of outputs that the classifier (the last ``nn.Linear``) must have. Default: not checked.
        new_classifier: load all weights but those of the classifier: the last ``nn.Linear``, or the parts of an
            ``MLDecoderNetwork``'s head that depend on the classes, and other layers that differ in the number of
            outputs alone. ``False``: an error about other classes names this argument; ``None``: it does not.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file cannot be read safely, holds no state_dict, does not fit the network, has another number
            of classes, or values that are not finite.
        ImportError: for a ``.safetensors`` file if safetensors is not installed.
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
    network.load_state_dict(weights, strict=False)  # checked above; strict=True would need num_batches_tracked
    network.__dict__[_CLASSES] = None if new_classifier else content.get("class_names")


def other_classes(network: nn.Module, data: Any) -> str | None:
    """How the classes of ``data`` differ from those that the weights of ``network`` were trained on.

    Args:
        network: a network that ``load_weights`` loaded into.
        data: a data module; one without ``class_names`` is not compared.

    Returns:
        The first difference, such as ``class 0 was 'ant', here it is 'bee'``; ``None`` if there is none, if the file
        had no class names, or if the names of either are plain numbers.
    """
    stored, names = network.__dict__.get(_CLASSES), getattr(data, "class_names", None)
    if not stored or not names or any(all(name.isdecimal() for name in both) for both in (stored, names)):
        return None
    pairs = enumerate(zip_longest(stored[: len(names)], names))  # a data set may lack the last classes
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
        # public programs save their command line with the weights as a Namespace, which is safe to unpickle
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
    """The state_dict in the content of a file, without the prefix ``module.`` of parallel training."""
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
    """The part of ``content`` under one of ``prefixes`` that has most names in common with the network."""
    parts = [
        {key.removeprefix(prefix): value for key, value in content.items() if key.startswith(prefix)}
        for prefix in prefixes
    ]
    # in a tie the first one, so that the error for a task with another network lists the network's names
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
    """The layers in both that differ in the number of outputs only, that is, in the number of classes."""
    shared = [key for key, value in weights.items() if key in own and isinstance(value, Tensor)]
    different = [key for key in shared if weights[key].shape != own[key].shape]
    strange = {
        _layer(key)
        for key in different
        if not weights[key].dim() == own[key].dim() > 0 or weights[key].shape[1:] != own[key].shape[1:]
    }
    return [layer for layer in dict.fromkeys(map(_layer, different)) if layer not in strange]


def last_linear(network: nn.Module) -> list[str]:
    """The path of the classifier in a list, which is empty if there is none."""
    if isinstance(network, MLDecoderNetwork):
        return ["head"]  # its own queries, weights and biases depend on the classes
    try:
        return [find_classifier(network)[0]]
    except ValueError:  # no linear layer
        return []


def _check_classes(network: nn.Module, num_classes: int, path: Path) -> None:
    try:
        with_decoder = isinstance(network, MLDecoderNetwork)  # its last linear layer is not the classifier
        classes = network.num_classes if with_decoder else find_classifier(network)[1].out_features
    except ValueError:  # no linear layer
        return
    if classes != num_classes:
        raise ValueError(
            f"weights {str(path)!r} has {classes} classes, the data has {num_classes}: "
            "give a network and weights trained on the same classes"
        )


def _some(keys: list[str]) -> str:
    """``3 (a, b, c)``: the number of keys and the first three of them."""
    return f"{len(keys)} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})" if keys else "0"
