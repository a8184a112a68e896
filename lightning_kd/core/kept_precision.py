"""Modules of which some parts stay float32 when a Trainer casts the rest to half precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["KeptPrecision"]


class KeptPrecision(nn.Module):
    """A module of which some buffers and submodules are not cast to half precision with it.

    Half precision makes sums, means, counts and moving averages wrong: in bfloat16 ``256 + 1`` is 256, and the largest
    float16 number is 65504. The named parts keep their dtype under ``half()``, ``to(torch.bfloat16)`` and the Trainer's
    ``16-true`` and ``bf16-true``. They still move to other devices and are cast to wider dtypes.
    """

    #: names of the buffers and submodules that keep their dtype
    kept_precise: tuple[str, ...] = ()

    def keep_precise(self, *names: str) -> None:
        """Add names of buffers and submodules that keep their dtype; they may be registered later."""
        self.kept_precise = (*self.kept_precise, *names)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        modules = {name: module for name in self.kept_precise if (module := self._modules.get(name)) is not None}
        buffers = {name: buffer for name in self.kept_precise if (buffer := self._buffers.get(name)) is not None}
        self._modules.update(dict.fromkeys(modules))  # set to None, not removed: their order stays
        self._buffers.update(dict.fromkeys(buffers))
        try:
            super()._apply(fn, recurse)
        finally:
            self._modules.update(modules)
            self._buffers.update(buffers)
        precise = _Precise(fn)
        if recurse:
            for module in modules.values():
                module._apply(precise)
        self._buffers.update({name: precise(buffer) for name, buffer in buffers.items()})
        return self


class _Precise:
    """``fn`` of a tensor, but the tensor keeps its dtype if ``fn`` would cast it to half precision."""

    def __init__(self, fn: Callable[[Tensor], Tensor]) -> None:
        self.fn = fn

    def __call__(self, tensor: Tensor) -> Tensor:
        found = self.fn(tensor)
        lost = found.dtype in (torch.float16, torch.bfloat16) and found.dtype != tensor.dtype
        return tensor.to(found.device) if lost else found
