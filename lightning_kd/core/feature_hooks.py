"""Reading features of any network by forward hooks on module paths."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def find_classifier(network: nn.Module, path: str | None = None) -> tuple[str, nn.Linear]:
    """The path and module of the classifier: the layer that turns the pooled feature into logits.

    Args:
        network: any network.
        path: module path of the classifier. Default: the last ``nn.Linear`` in the order of definition.

    Raises:
        ValueError: if ``path`` is not that of an ``nn.Linear``, or the network has none.
    """
    modules = dict(network.named_modules())
    if path is not None:
        module = modules.get(path)
        if not isinstance(module, nn.Linear):
            got = "nothing" if module is None else type(module).__name__
            raise ValueError(f"classifier path {path!r} is {got} in {type(network).__name__}: name an nn.Linear in it")
        return path, module
    for name, module in reversed(modules.items()):
        if isinstance(module, nn.Linear):
            return name, module
    raise ValueError(f"{type(network).__name__} has no nn.Linear to take as classifier: name one by its module path")


def check_not_compiled(network: nn.Module, what: str) -> None:
    """Raise if the network is compiled, because hooks added after that never fire.

    Args:
        network: the network that gets a hook.
        what: name of the hooked module, for the message.

    Raises:
        RuntimeError: if it is compiled.
    """
    if getattr(network, "_compiled_call_impl", None) is not None:
        raise RuntimeError(f"a tap on {what} after compile() would never fire: tap the network first")


class Tap:
    """Keeps the input or output of one module in the latest forward pass of a network, with its autograd graph.

    A tap must be made before the network is compiled, because hooks added later never fire.

    Args:
        network: the network.
        path: path of the module, as in ``network.named_modules()``.
        side: ``"output"`` of the module or its first ``"input"``.
        copy: keep a copy, for a tensor that the network overwrites later.

    Raises:
        ValueError: for an unknown path, naming known ones of the same depth.
        RuntimeError: if the network is compiled.
    """

    def __init__(self, network: nn.Module, path: str, side: str = "output", copy: bool = False) -> None:
        modules = dict(network.named_modules())
        if path not in modules:
            known = [name for name in modules if name and name.count(".") == path.count(".")]
            raise ValueError(
                f"no module {path!r} in {type(network).__name__}; at that depth there are {known[:12]}: name one"
            )
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
        # the hooks of a copied module report to this tap, and a tensor with a graph cannot be copied
        return self

    def pop(self) -> Tensor:
        """The tensor of the latest forward pass, once: the tap then drops it, so that its graph can be freed.

        Raises:
            RuntimeError: if there was no forward pass since the last call, or the module gave no tensor.
        """
        value, self._value = self._value, None
        if not isinstance(value, torch.Tensor):
            raise RuntimeError(f"the tap on {self.path!r} has seen no tensor: run the network's forward first")
        return value


def penultimate_tap(network: nn.Module, classifier: str | None = None) -> tuple[Tap, nn.Linear]:
    """A tap on the feature ``[B, D]`` that enters the classifier, and the classifier, see ``find_classifier``."""
    path, module = find_classifier(network, classifier)
    return Tap(network, path, side="input"), module


class PooledFeature:
    """The feature ``[B, D]`` of each image in the latest forward pass of a network, with its autograd graph.

    It is the input of the classifier; for a network with an ML-Decoder head, the mean over the feature map.

    Args:
        network: the network, not compiled yet.
    """

    def __init__(self, network: nn.Module) -> None:
        path = getattr(network, "feature_map", None)  # of an MLDecoderNetwork
        self.tap = penultimate_tap(network)[0] if path is None else Tap(network, f"network.{path}")

    def pop(self) -> Tensor:
        """The feature ``[B, D]``, once: it is dropped here, see ``Tap.pop``."""
        value = self.tap.pop()
        if value.ndim == 3:  # tokens
            return value.mean(1)
        return value.flatten(2).mean(2) if value.ndim > 3 else value
