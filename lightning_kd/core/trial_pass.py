"""A trial forward pass of one image that records the calls of all modules of a network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_kd.core.module_modes import eval_mode
from lightning_kd.core.random_state import same_random_state

__all__ = ["Call", "trial_pass"]


@dataclass
class Call:
    """The call of a module in the trial pass.

    Tensors are compared by identity. A tensor that was overwritten in place after the call has a higher version
    (``tensor._version``) at the end of the pass than the one recorded here.

    Attributes:
        path: module path.
        module: the module.
        given: its first input, if that is a tensor.
        given_version: version of ``given`` at the call.
        output: its output, if that is a tensor.
        output_version: version of ``output`` at the end of the call.
    """

    path: str
    module: nn.Module
    given: Tensor | None
    given_version: int
    output: Tensor | None
    output_version: int
    #: whether input and output have their channels in the last dimension, as between ``nn.LayerNorm`` and ``nn.Linear``
    given_last: bool = False
    output_last: bool = False

    @property
    def leaf(self) -> bool:
        return next(self.module.children(), None) is None

    @property
    def is_activation(self) -> bool:
        homes = (kind.__module__.rsplit(".", 1)[-1] for kind in type(self.module).__mro__)
        return self.leaf and any(home.startswith("activation") for home in homes)  # of torch and timm

    @property
    def is_map(self) -> bool:
        return _is_map(self.output)

    @property
    def given_size(self) -> torch.Size | None:
        """Height and width of the input, if it is a map."""
        return _size(self.given, self.given_last)

    @property
    def size(self) -> torch.Size | None:
        """Height and width of the output, if it is a map."""
        return _size(self.output, self.output_last)


def trial_pass(network: nn.Module, input_shape: Sequence[int]) -> list[Call]:
    """The calls of all modules in a forward pass of one random image, in the order in which they end.

    The pass is in eval mode and without gradient; the network and the random generators do not change.

    Args:
        network: a network on any device.
        input_shape: shape of one image ``(C, H, W)`` or of one feature row ``(D,)``.
    """
    calls: list[Call] = []
    under_way: list[tuple[Tensor | None, int]] = []

    def begin(module: nn.Module, args: tuple[Any, ...]) -> None:
        given = args[0] if args and isinstance(args[0], Tensor) else None
        under_way.append((given, 0 if given is None else given._version))

    def end(path: str, module: nn.Module, output: Any) -> None:
        output = output if isinstance(output, Tensor) else None
        calls.append(Call(path, module, *under_way.pop(), output, 0 if output is None else output._version))

    handles = []
    for path, module in network.named_modules():
        handles.append(module.register_forward_pre_hook(begin))
        handles.append(module.register_forward_hook(lambda m, args, output, path=path: end(path, m, output)))
    example = next(network.parameters(), torch.empty(0))
    image = torch.randn(1, *input_shape, generator=torch.Generator().manual_seed(0)).to(example)
    try:
        with eval_mode(network), torch.no_grad(), same_random_state(example.device):
            network(image)
    finally:
        for handle in handles:
            handle.remove()
    if len(input_shape) == 3:
        _find_layouts(calls, input_shape[1], input_shape[2])
    return calls


def _find_layouts(calls: list[Call], height: int, width: int) -> None:
    """Set ``given_last`` and ``output_last`` of the calls.

    A map ``[1, a, b, c]`` has its channels last if a layer that works on the last dimension made a map of ``c``
    channels, and ``a`` to ``b`` is the proportion of the image while ``b`` to ``c`` is not.
    """
    kinds = (nn.Linear, nn.LayerNorm)
    made = [call.output for call in calls if call.is_map and isinstance(call.module, kinds)]
    widths = {output.shape[3] for output in made if output is not None}

    def like_image(a: int, b: int) -> bool:
        return abs(a * width - b * height) <= max(height, width)  # sizes are rounded

    def last(tensor: Tensor | None) -> bool:
        if tensor is None or not _is_map(tensor):
            return False
        a, b, c = tensor.shape[1:]
        return c in widths and like_image(a, b) and not like_image(b, c)

    for call in calls:
        call.given_last, call.output_last = last(call.given), last(call.output)


def _is_map(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.ndim == 4


def _size(tensor: Tensor | None, last: bool) -> torch.Size | None:
    if tensor is None or not _is_map(tensor):
        return None
    return tensor.shape[1:3] if last else tensor.shape[2:]
