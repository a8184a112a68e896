"""The network that a training starts from: with random weights, those of a file, or published ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import torchvision
from torch import nn

from lightning_kd.argument_checks import naming_argument
from lightning_kd.core.weights import differing_classifiers, last_linear, load_weights
from lightning_kd.nets import split_head, with_ml_decoder
from lightning_kd.nets.library_networks import (
    timm_library,
    torchvision_name,
    torchvision_network,
    without_auxiliary_heads,
)

__all__ = ["leave_teacher_out", "network_with_weights", "pretrained_network", "weights_from_checkpoint"]

_come_from_checkpoint = False


def network_with_weights(
    network: str | nn.Module,
    weights: str | None,
    num_classes: int,
    build: Callable[[str | nn.Module], nn.Module],
    *,
    new_classifier: bool = False,
    input_shape: Sequence[int] = (3, 32, 32),
    argument: str = "weights",
) -> nn.Module:
    """The network that a training starts from.

    Args:
        network: a network's name or a module.
        weights: a checkpoint or ``state_dict`` file; ``"default"`` for the published weights of a ``timm/`` or
            ``torchvision/`` network, with a new classifier if they are for another number of classes (a head such as
            ``+ml_decoder`` is always new); ``None`` for random weights, or those of a module.
        num_classes: number of logits.
        build: makes the network from a name, as ``Task.build``.
        new_classifier: take all weights but those of the classifier from ``weights``.
        input_shape: shape of one image; timm adapts published weights to another number of channels.
        argument: name of the argument ``weights`` in messages.

    Raises:
        FileNotFoundError: if the file ``weights`` does not exist; the message names the ``argument``.
        ValueError: for ``"default"`` with a module or with feature rows, and as ``load_weights`` and
            ``pretrained_network``.
    """
    of_network = argument.removesuffix("weights").rstrip("_") or "network"  # student_weights are those of student
    if weights == "default" and not _come_from_checkpoint:
        if not isinstance(network, str):
            raise ValueError(
                f"{argument} 'default' needs the network by name, got a {type(network).__name__}: give its name, or a "
                "file of weights"
            )
        if len(input_shape) != 3:
            raise ValueError(
                f"{argument} 'default' are for images (C, H, W), but input_shape is {tuple(input_shape)}: for features "
                "train an mlp from scratch, or give a file of weights"
            )
        with naming_argument(of_network):
            return build(_published(network, num_classes, new_classifier, input_shape))
    with naming_argument(of_network):
        built = build(network)
    if weights == "default" and hasattr(built, "transform_input"):
        built.transform_input = True  # type: ignore[assignment]  # torchvision sets it with published weights
    elif weights is not None and not _come_from_checkpoint:
        try:
            with naming_argument(argument):
                load_weights(built, weights, num_classes, new_classifier)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{error}. If a config names the file of another run, fit that run first; null starts from scratch"
            ) from error
    return built


def _published(name: str, num_classes: int, new_classifier: bool, input_shape: Sequence[int]) -> nn.Module:
    backbone, head = split_head(name)
    network = pretrained_network(backbone, num_classes, new_classifier, input_shape[0])
    return network if head is None else with_ml_decoder(network, num_classes, input_shape, **head)


@contextmanager
def weights_from_checkpoint(given: bool = True) -> Iterator[None]:
    """A context in which networks are built without their starting weights, because a checkpoint is loaded afterwards.

    Loading a checkpoint then needs neither the weights file nor the download that its training started from.

    Args:
        given: whether a checkpoint is loaded; False makes the context do nothing.
    """
    global _come_from_checkpoint
    before, _come_from_checkpoint = _come_from_checkpoint, given
    try:
        yield
    finally:
        _come_from_checkpoint = before


def leave_teacher_out(arguments: MutableMapping[str, Any]) -> None:
    """Set ``teacher_weights`` in the arguments of a task to ``"random"``, in place.

    Predictions do not use the teacher, so its file need not exist.
    """
    if arguments.get("teacher_weights") is not None:
        arguments["teacher_weights"] = "random"


def pretrained_network(
    name: str, num_classes: int, new_classifier: bool | None = None, in_channels: int = 3
) -> nn.Module:
    """``timm/NAME`` or ``torchvision/NAME`` with its published weights, which are downloaded if needed.

    Published weights expect images normalised as the library says, mostly by the mean and the standard deviation of
    ImageNet.

    Args:
        name: name of the network, with its library.
        num_classes: number of classes of the data.
        new_classifier: ``True``: always give the network a new classifier; ``False``: only if the published one has
            another number of classes; ``None``: never, another number of classes is an error.
        in_channels: channels of the images. Only ``timm/`` networks, whose first layer is adapted, take other than 3.

    Raises:
        ValueError: if the name has no library in front or is unknown to it, no weights are published, they are for
            another number of classes, or the library cannot take so many channels.
        ImportError: for ``timm/NAME`` if timm is not installed.
        OSError: if the weights cannot be downloaded.
    """
    if split_head(name)[1] is not None:
        raise ValueError(f"network {name!r} has a head without published weights: train it, and give its file")
    library, _, short = name.partition("/")
    if library == "timm":
        timm = timm_library(name)
        if not timm.models.is_model_pretrained(short):
            raise ValueError(f"network {name!r} has no published weights: give a file as weights")
        published = timm.models.get_pretrained_cfg(short).num_classes
    elif library == "torchvision":
        short = torchvision_name(name)
        published = len(torchvision.models.get_model_weights(short).DEFAULT.meta["categories"])
    else:
        raise ValueError(
            f"weights 'default' exist only for timm/ and torchvision/ names, not for {name!r}: give a file as weights"
        )
    if published != num_classes and new_classifier is None:
        raise ValueError(
            f"the published weights of {name!r} have {published} classes, the data has {num_classes}: "
            "train this network on the data first and give its checkpoint as weights"
        )
    replaced = bool(new_classifier) or published != num_classes
    try:
        if library == "timm":
            options = {"num_classes": num_classes} if published != num_classes else {}
            if in_channels != 3:
                options["in_chans"] = in_channels
            network = timm.create_model(short, pretrained=True, **options)
            if replaced and published == num_classes:
                network.reset_classifier(num_classes)
            return network
        # a network with new classification layers; built before the download, so that wrong channels raise at once
        fresh = torchvision_network(name, num_classes, in_channels) if replaced or in_channels != 3 else None
        network = torchvision.models.get_model(short, weights="DEFAULT")
    except OSError as error:
        raise OSError(
            f"the published weights of {name!r} cannot be downloaded ({error}): connect, or give a file as weights"
        ) from error
    network = without_auxiliary_heads(short, network)
    if fresh is not None:
        classifiers = differing_classifiers(network.state_dict(), fresh.state_dict()) or last_linear(fresh)
        for path in classifiers:
            parent, _, leaf = path.rpartition(".")
            setattr(network.get_submodule(parent), leaf, fresh.get_submodule(path))
    return network
