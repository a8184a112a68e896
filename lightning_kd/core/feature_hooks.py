"""Features of any network, by forward hooks on module paths."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def find_classifier(network: nn.Module, path: str | None = None) -> tuple[str, nn.Linear]:
    """The path and module of the layer that turns the pooled feature into logits.

    Args:
        network: any network.
        path: the classifier's module path where it is not the last ``nn.Linear`` in definition order.

    Raises:
        ValueError: if ``path`` names no ``nn.Linear``, or no ``nn.Linear`` is found.
    """
    modules = dict(network.named_modules())
    if path is not None:
        module = modules.get(path)
        if not isinstance(module, nn.Linear):
            got = "nothing" if module is None else type(module).__name__
            raise ValueError(f"classifier path {path!r} is {got} in {type(network).__name__}: name an nn.Linear of it")
        return path, module
    for name, module in reversed(modules.items()):
        if isinstance(module, nn.Linear):
            return name, module
    raise ValueError(f"{type(network).__name__} has no nn.Linear to take as classifier: name one by its module path")


def check_not_compiled(network: nn.Module, what: str) -> None:
    """Refuse to listen to a network that is compiled already.

    Raises:
        RuntimeError: if it is: hooks added later never fire.
    """
    if getattr(network, "_compiled_call_impl", None) is not None:
        raise RuntimeError(f"a tap on {what} after compile() would never fire: tap the network first")


class Tap:
    """Keeps what passes through one module of a network in the latest forward pass, with its graph.

    A tap must be set before the network is compiled: hooks added later never fire, so they are refused.

    Args:
        network: the network to listen to.
        path: module path inside it, as in ``network.named_modules()``.
        side: ``"output"`` of the module or its first ``"input"``.
        copy: keep a copy, where the network overwrites the tensor later on.

    Raises:
        ValueError: for an unknown path, with the known ones of the same depth.
        RuntimeError: if the network is compiled already.
    """

    def __init__(self, network: nn.Module, path: str, side: str = "output", copy: bool = False) -> None:
        modules = dict(network.named_modules())
        if path not in modules:
            known = [name for name in modules if name and name.count(".") == path.count(".")]
            raise ValueError(f"no module {path!r} in {type(network).__name__}; at that depth there are {known[:12]}")
        check_not_compiled(network, repr(path))
        self.path, self.side, self.copy = path, side, copy
        self._value: Any = None
        if side == "input":
            self.handle = modules[path].register_forward_pre_hook(self._keep_input)
        elif side == "output":
            self.handle = modules[path].register_forward_hook(self._keep_output)
        else:
            raise ValueError(f"side must be 'input' or 'output', got {side!r}")

    def _keep_input(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._value = args[0].clone() if self.copy else args[0]

    def _keep_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._value = output.clone() if self.copy else output

    def __deepcopy__(self, memo: dict[int, Any]) -> Tap:
        # A copied module keeps hooks that report to this tap; a graph tensor cannot be copied anyway.
        return self

    def pop(self) -> Tensor:
        """The tensor of the latest forward pass; the tap lets go of it, so that its graph can be freed."""
        value, self._value = self._value, None
        if not isinstance(value, torch.Tensor):
            raise RuntimeError(f"the tap on {self.path!r} has seen no tensor: run the network's forward first")
        return value


def penultimate_tap(network: nn.Module, classifier: str | None = None) -> tuple[Tap, nn.Linear]:
    """A tap on the feature ``[B, D]`` that enters the classifier, and the classifier itself (found or named)."""
    path, module = find_classifier(network, classifier)
    return Tap(network, path, side="input"), module


class PooledFeature:
    """The feature ``[B, D]`` of each image in the latest forward pass of a network, with its graph.

    It is what enters the classifier; of a network with a query a label, the mean over its map.

    Args:
        network: to listen to, before it is compiled.
    """

    def __init__(self, network: nn.Module) -> None:
        path = getattr(network, "feature_map", None)  # of an MLDecoderNetwork
        self.tap = penultimate_tap(network)[0] if path is None else Tap(network, f"network.{path}")

    def pop(self) -> Tensor:
        """The feature; the tap lets go of it."""
        value = self.tap.pop()
        if value.ndim == 3:  # tokens
            return value.mean(1)
        return value.flatten(2).mean(2) if value.ndim > 3 else value
