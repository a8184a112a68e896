"""Run a network on copies of its parameters and buffers, so that the network itself stays unchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities import move_data_to_device
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.func import functional_call

from lightning_kd.core.batch import is_batch
from lightning_kd.core.distributed import process_count
from lightning_kd.core.random_state import same_random_state
from lightning_kd.metrics._arguments import chosen_parameters


class Copies:
    """A network that runs on copies of its parameters and buffers.

    All copies and batches are contiguous: second derivatives of convolutions are slower in channels_last.

    Attributes:
        names: names of the parameters that derivatives are taken with respect to.
        leaves: copies of these parameters in ``dtype``, in the same order.
        weights: these parameters flattened into one vector ``[P]``.
        fixed: copies of all other parameters and of the buffers.
        dtype: of the computation: float64 where the network has a float64 parameter, else float32.
    """

    def __init__(self, model: nn.Module, loader: Any, parameters: Sequence[str] | None) -> None:
        chosen = chosen_parameters(model, parameters)
        values = dict(model.named_parameters())
        wide = any(p.dtype == torch.float64 for p in values.values())
        self.dtype = torch.float64 if wide else torch.float32  # half precision is computed in float32
        self.names = list(chosen)
        self.leaves = [self._own(p).clone().requires_grad_() for p in chosen.values()]
        self.sizes = [leaf.numel() for leaf in self.leaves]
        self.device = self.leaves[0].device
        self.weights = torch.cat([leaf.detach().reshape(-1) for leaf in self.leaves])
        self.fixed = {f"model.{name}": self._own(p) for name, p in values.items() if name not in chosen}
        self.fixed |= {f"model.{name}": self._own(buffer).clone() for name, buffer in model.named_buffers()}
        self._call = _Call(model)
        self._loader = [loader] if is_batch(loader) else loader
        if not isinstance(self._loader, Iterable) or isinstance(self._loader, Iterator):
            raise TypeError(
                f"loader must be a batch, a list of batches or a loader that can be read again and again, got "
                f"{type(loader).__name__}: make a list of it"
            )

    def share_buffers(self, model: nn.Module) -> None:
        """Copy the buffers of process 0 to all: batch-normalisation statistics can differ between processes."""
        for name, _ in model.named_buffers():
            if process_count() > 1 and self.fixed[f"model.{name}"].is_floating_point():
                dist.broadcast(self.fixed[f"model.{name}"], 0)

    def split(self, vector: Tensor) -> list[Tensor]:
        """``vector`` ``[P]`` cut into tensors shaped like ``leaves``."""
        parts = vector.to(self.device, self.dtype).split(self.sizes)
        return [part.view(leaf.shape) for part, leaf in zip(parts, self.leaves, strict=True)]

    def check(self, vector: Tensor, name: str) -> Tensor:
        """``vector`` on the device and in the dtype of ``weights``; ValueError where it is not ``[P]``."""
        if vector.shape != self.weights.shape:
            raise ValueError(
                f"{name} must be [{len(self.weights)}], one number for each entry of the parameters, got "
                f"{list(vector.shape)}"
            )
        return vector.detach().to(self.device, self.dtype)

    @property
    def sums_dtype(self) -> torch.dtype:
        return torch.float32 if self.device.type == "mps" else torch.float64

    def batches(self) -> Iterator[tuple[int, Any]]:
        """Number and tensors of each batch of one pass over the data, on the device and in the dtype of the copies."""
        for number, batch in enumerate(self._loader):
            yield number, apply_to_collection(move_data_to_device(batch, self.device), Tensor, self._own)

    def run(
        self,
        function: Callable[[nn.Module, Any], Tensor],
        leaves: Sequence[Tensor],
        number: int,
        batch: Any,
        fixed: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """``function(network, batch)`` with ``leaves`` as the parameters.

        The random state depends only on ``number``, the batch's position: every pass draws the same numbers.
        """
        given = {f"model.{name}": leaf for name, leaf in zip(self.names, leaves, strict=True)}
        with same_random_state(self.device, number):
            return functional_call(self._call, {**(fixed or self.fixed), **given}, (function, batch))

    def _own(self, value: Tensor) -> Tensor:
        value = value.detach()
        value = value.clone() if value.is_inference() else value
        return value.to(self.dtype).contiguous() if value.is_floating_point() else value


class _Call(nn.Module):
    """``function(model, batch)`` as a module, because ``functional_call`` replaces the parameters of a module."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[nn.Module, Any], Tensor], batch: Any) -> Tensor:
        return function(self.model, batch)
