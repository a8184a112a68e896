"""The mean loss of a network over data as a function of its parameters, with first and second derivatives.

Nothing here touches the network: it is run on copies of its parameters and buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.fabric.utilities import move_data_to_device
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_kd.metrics._inputs import batch_size, chosen_parameters, is_batch
from lightning_kd.metrics._surroundings import no_tf32, same_random_state, saved_bytes

LossFn = Callable[[nn.Module, Any], Tensor]

# Graphs of batches are kept from one Hessian-vector product to the next up to so many bytes: one that is there saves a
# third to a half of the work, and a network that needs more has to go without.
KEPT_BYTES = 2**31


@dataclass(frozen=True)
class Measured:
    """What a result refers to.

    Attributes:
        loss: mean over all samples, with the ``l2`` term where one is given.
        samples: how many, over all processes.
        hvps: products of the whole Hessian with a vector that were made; each is a pass over the samples.
        dtype: of the computation, ``"float32"`` or ``"float64"``.
        parameters: names of the parameters that the derivatives are in. The network was in eval mode.
    """

    loss: float
    samples: int
    hvps: int
    dtype: str
    parameters: list[str]


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    """Mean cross-entropy of ``model(batch[0])`` on the targets ``batch[1]``."""
    return F.cross_entropy(model(batch[0]), batch[1])


class Objective:
    """Made by ``objective``. All methods but ``split`` are collective: every process calls them alike.

    Attributes:
        names: of the parameters that are varied.
        leaves: float copies of them, in the same order.
        weights: all of them as one vector ``[P]``; vectors of this length are what the methods take and give.
        fixed: copies of all other parameters and of the buffers.
    """

    def __init__(
        self, model: nn.Module, loss_fn: LossFn | None, loader: Any, parameters: Sequence[str] | None, l2: float
    ) -> None:
        chosen = chosen_parameters(model, parameters)
        values = dict(model.named_parameters())
        wide = any(p.dtype == torch.float64 for p in values.values())
        self.dtype = torch.float64 if wide else torch.float32  # of half precision a float32 copy
        self.names = list(chosen)
        self.leaves = [p.detach().to(self.dtype, copy=True).requires_grad_() for p in chosen.values()]
        self.sizes = [leaf.numel() for leaf in self.leaves]
        self.device = self.leaves[0].device
        self.weights = torch.cat([leaf.detach().reshape(-1) for leaf in self.leaves])
        self.l2 = l2
        self.hvps = 0
        self.samples = 0
        self.loss = float("nan")
        self.fixed = {f"model.{name}": self._own(p) for name, p in values.items() if name not in chosen}
        for name, buffer in model.named_buffers():
            self.fixed[f"model.{name}"] = copy = self._own(buffer).clone()
            if _distributed() and copy.is_floating_point():
                dist.broadcast(copy, 0)  # statistics that each process has of its own batches: one network for all
        self._call = _Call(model)
        self._loss_fn = loss_fn or cross_entropy
        self._loader = [loader] if is_batch(loader) else loader
        if not isinstance(self._loader, Iterable) or isinstance(self._loader, Iterator):
            raise TypeError(
                f"loader must be a batch, a list of batches or a loader that can be read again and again, got "
                f"{type(loader).__name__}: make a list of it"
            )
        self._kept: list[tuple[int, float, list[tuple[int, Tensor]]]] = []
        self._kept_bytes = 0
        self._full = False
        self._kept_all = False

    # -- vectors -----------------------------------------------------------------------------------------------------

    def split(self, vector: Tensor) -> list[Tensor]:
        """``vector`` ``[P]`` as tensors shaped like the parameters."""
        parts = vector.to(self.device, self.dtype).split(self.sizes)
        return [part.view(leaf.shape) for part, leaf in zip(parts, self.leaves, strict=True)]

    def check(self, vector: Tensor, name: str) -> Tensor:
        """``vector`` as one of this objective, if it has the length."""
        if vector.shape != self.weights.shape:
            raise ValueError(
                f"{name} must be [{len(self.weights)}], one number for each entry of the parameters, got "
                f"{list(vector.shape)}"
            )
        return vector.detach().to(self.device, self.dtype)

    # -- passes ------------------------------------------------------------------------------------------------------

    def evaluate(
        self,
        measure: Callable[[nn.Module, Any], Tensor],
        weights: Tensor | None = None,
        fixed: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """``measure`` of each batch, float64 ``[...]`` summed over all batches.

        ``measure`` gives sums over the batch; it runs without gradient, at ``weights`` (default: as they are) and with
        ``fixed`` in place of ``self.fixed``.
        """
        leaves = self.leaves if weights is None else self.split(weights)
        total: Tensor | None = None
        with same_random_state(self.device), torch.no_grad():
            for batch in self._batches():
                part = self._run(measure, leaves, batch, fixed).to(self._sums_dtype)
                total = part if total is None else total + part
        return self._reduced(total)

    def collect(self, measure: Callable[[nn.Module, Any], Sequence[Tensor]]) -> list[Tensor]:
        """``measure`` of each batch, tensors ``[B, ...]``, of all batches and processes, on the CPU."""
        rows: list[list[Tensor]] = []

        def keep(model: nn.Module, batch: Any) -> Tensor:
            rows.append([part.detach().cpu() for part in measure(model, batch)])
            return torch.zeros((), device=self.device)

        self.evaluate(keep)
        if _distributed():
            everyone: list[list[list[Tensor]]] = [[] for _ in range(dist.get_world_size())]
            dist.all_gather_object(everyone, rows)
            rows = [row for part in everyone for row in part]
        return [torch.cat(column) for column in zip(*rows, strict=True)]

    def value(self, weights: Tensor | None = None, fixed: dict[str, Tensor] | None = None) -> float:
        """The mean loss at ``weights``; at the network's own it must be what every earlier pass found."""

        def measure(model: nn.Module, batch: Any) -> Tensor:
            size = batch_size(batch)
            loss = self._checked(self._loss_fn(model, batch)).to(self._sums_dtype)
            return torch.stack([loss * size, loss.new_tensor(size)])

        total, samples = self.evaluate(measure, weights, fixed).tolist()
        if weights is None:
            return self._note(total, samples)
        return total / samples + self.l2 / 2 * float(weights.double().square().sum())

    def gradient(self) -> Tensor:
        """The gradient of the mean loss, ``[P]``."""
        total = torch.zeros_like(self.weights)
        sums = [0.0, 0.0]
        with same_random_state(self.device):
            for batch in self._batches():
                size, loss, gradients = self._gradients(batch, create_graph=False)
                self._add(total, gradients, size)
                sums = [sums[0] + size * loss, sums[1] + size]
        return self._mean(total, sums) + self.l2 * self.weights

    def hvp(self, vector: Tensor) -> Tensor:
        """The Hessian of the mean loss times ``vector`` ``[P]``."""
        parts = self.split(vector)
        total = torch.zeros_like(self.weights)
        sums = [0.0, 0.0]
        for size, loss, gradients, keep in self._graphs():
            self._add(total, self._second(gradients, parts, keep), size)
            sums = [sums[0] + size * loss, sums[1] + size]
        self.hvps += 1
        return self._mean(total, sums) + self.l2 * vector

    def quadratic_forms(self, vectors: Sequence[Tensor]) -> Tensor:
        """``v^T H v`` of each vector ``[P]``, by parameters: float64 ``[len(vectors), len(names)]`` on the CPU.

        All vectors go through one graph of each batch, and processes exchange these sums alone.
        """
        forms = torch.zeros(len(vectors), len(self.names), dtype=self._sums_dtype, device=self.device)
        sums = [0.0, 0.0]
        for size, loss, gradients, keep in self._graphs():
            for i, vector in enumerate(vectors):
                parts = self.split(vector)
                products = self._second(gradients, parts, keep or i < len(vectors) - 1)
                for k, product in products:
                    forms[i, k] += size * (parts[k] * product).sum(dtype=self._sums_dtype)
            sums = [sums[0] + size * loss, sums[1] + size]
        self.hvps += len(vectors)
        forms = self._mean(forms, sums).double().cpu()
        if self.l2:
            squares = [[part.double().square().sum() for part in self.split(vector)] for vector in vectors]
            forms += self.l2 * torch.tensor(squares, dtype=torch.float64)
        return forms

    def gradient_forms(self, cotangent: Callable[[int, int, Tensor], Tensor], probes: Sequence[int]) -> Tensor:
        """Mean over samples of the squared norms of gradients of the network's output, by parameters.

        Args:
            cotangent: of the probe, the number of the batch and the output for ``batch[0]``; shaped like the output.
            probes: numbers of the probes.

        Returns:
            float64 ``[len(probes), len(names)]`` on the CPU.
        """
        forms = torch.zeros(len(probes), len(self.names), dtype=self._sums_dtype, device=self.device)
        sums = [0.0, 0.0]
        with same_random_state(self.device):
            for number, batch in enumerate(self._batches()):
                output = self._run(lambda model, batch: model(batch[0]), self.leaves, batch)
                loss, size = F.cross_entropy(output.detach(), batch[1]), batch_size(batch)
                for i, probe in enumerate(probes):
                    given = cotangent(probe, number, output)
                    keep = i < len(probes) - 1
                    found = torch.autograd.grad(output, self.leaves, given, retain_graph=keep, allow_unused=True)
                    for k, gradient in enumerate(found):
                        if gradient is not None:
                            forms[i, k] += gradient.square().sum(dtype=self._sums_dtype)
                sums = [sums[0] + size * float(loss), sums[1] + size]
        return self._mean(forms, sums).double().cpu()

    def measured(self) -> dict[str, Any]:
        """The fields of ``Measured``."""
        dtype = str(self.dtype).removeprefix("torch.")
        return {
            "loss": self.loss, "samples": self.samples, "hvps": self.hvps, "dtype": dtype, "parameters": self.names,
        }  # fmt: skip

    # -- parts -------------------------------------------------------------------------------------------------------

    @property
    def _sums_dtype(self) -> torch.dtype:
        return torch.float32 if self.device.type == "mps" else torch.float64

    def _own(self, value: Tensor) -> Tensor:
        value = value.detach()
        value = value.clone() if value.is_inference() else value
        return value.to(self.dtype) if value.is_floating_point() else value

    def _batches(self) -> Iterator[Any]:
        for batch in self._loader:
            yield apply_to_collection(move_data_to_device(batch, self.device), Tensor, self._own)

    def _run(
        self,
        function: Callable[[nn.Module, Any], Tensor],
        leaves: Sequence[Tensor],
        batch: Any,
        fixed: dict[str, Tensor] | None = None,
    ) -> Tensor:
        given = {f"model.{name}": leaf for name, leaf in zip(self.names, leaves, strict=True)}
        return functional_call(self._call, {**(fixed or self.fixed), **given}, (function, batch))

    def _checked(self, loss: Tensor) -> Tensor:
        if not isinstance(loss, Tensor) or loss.ndim:
            got = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"loss_fn must give the mean loss of a batch as a scalar tensor, got {got}")
        return loss

    def _gradients(self, batch: Any, create_graph: bool) -> tuple[int, float, list[tuple[int, Tensor]]]:
        """Size and loss of a batch, and the gradient by the number of each parameter that it has one in."""
        loss = self._checked(self._run(self._loss_fn, self.leaves, batch))
        if not loss.requires_grad:
            raise ValueError("the loss has no gradient in the parameters: give a loss_fn that is computed from them")
        found = torch.autograd.grad(loss, self.leaves, create_graph=create_graph, allow_unused=True)
        return batch_size(batch), float(loss.detach()), [(k, g) for k, g in enumerate(found) if g is not None]

    def _graphs(self) -> Iterator[tuple[int, float, list[tuple[int, Tensor]], bool]]:
        """The differentiable gradient of each batch, and whether its graph is wanted again."""
        for size, loss, gradients in self._kept:
            yield size, loss, gradients, True
        if self._kept_all:
            return
        with same_random_state(self.device):
            for i, batch in enumerate(self._batches()):
                if i < len(self._kept):
                    continue
                if not self._full:
                    with saved_bytes(self._ignored) as count:
                        size, loss, gradients = self._gradients(batch, create_graph=True)
                    self._kept_bytes += count[0]
                    self._full = self._kept_bytes > KEPT_BYTES
                    if not self._full:
                        self._kept.append((size, loss, gradients))
                    yield size, loss, gradients, not self._full
                else:
                    yield *self._gradients(batch, create_graph=True), False
        self._kept_all = not self._full

    @property
    def _ignored(self) -> set[int]:
        return {tensor.untyped_storage().data_ptr() for tensor in [*self.leaves, *self.fixed.values()]}

    def _second(self, gradients: list[tuple[int, Tensor]], parts: list[Tensor], keep: bool) -> list[tuple[int, Tensor]]:
        """The batch's Hessian times ``parts``; where nothing comes, the derivative is zero."""
        curved = [(k, g) for k, g in gradients if g.requires_grad]
        if not curved:
            return []
        try:
            found = torch.autograd.grad(
                [g for _, g in curved], self.leaves, [parts[k] for k, _ in curved], retain_graph=keep, allow_unused=True
            )
        except RuntimeError as error:
            raise RuntimeError(
                f"the loss has an operation without a second derivative ({str(error).splitlines()[0]}): use a plain "
                "form of it, such as math attention or an RNN outside of cuDNN"
            ) from error
        return [(k, h) for k, h in enumerate(found) if h is not None]

    def _add(self, total: Tensor, parts: list[tuple[int, Tensor]], size: int) -> None:
        places = total.split(self.sizes)
        for k, part in parts:
            places[k].add_(part.reshape(-1), alpha=size)

    def _reduced(self, sums: Tensor | None) -> Tensor:
        if not _distributed():
            if sums is None:
                raise ValueError("loader gave no batch: give at least one sample")
            return sums
        shapes: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(shapes, None if sums is None else tuple(sums.shape))
        shape = next((s for s in shapes if s is not None), None)
        if shape is None:
            raise ValueError("loader gave no batch: give at least one sample")
        sums = torch.zeros(shape, dtype=self._sums_dtype, device=self.device) if sums is None else sums
        dist.all_reduce(sums)
        return sums

    def _mean(self, total: Tensor, sums: list[float]) -> Tensor:
        """``total`` of all processes over their samples, after noting the loss."""
        both = torch.tensor(sums, dtype=self._sums_dtype, device=self.device)
        if _distributed():
            dist.all_reduce(both)
            dist.all_reduce(total)
        loss, samples = both.tolist()
        self._note(loss, samples)
        return total.div_(samples)

    def _note(self, total: float, samples: float) -> float:
        if not samples:
            raise ValueError("loader gave no sample: give at least one")
        loss = total / samples + self.l2 / 2 * float(self.weights.double().square().sum())
        if not np.isfinite(loss):
            raise ValueError(f"the loss is {loss}: a network or data that is not finite has no sharpness")
        if self.samples and (samples != self.samples or abs(loss - self.loss) > 1e-4 * abs(self.loss) + 1e-7):
            raise ValueError(
                f"loader gave {self.samples} samples of loss {self.loss:.6g} in one pass and {int(samples)} of loss "
                f"{loss:.6g} in another: every pass must give the same samples, without shuffling or augmentation"
            )
        if not self.samples:
            self.samples, self.loss = int(samples), loss
        return loss


@contextmanager
def objective(
    model: nn.Module,
    loss_fn: LossFn | None,
    loader: Any,
    *,
    parameters: Sequence[str] | None = None,
    l2: float = 0.0,
) -> Iterator[Objective]:
    """``model`` in eval mode as an ``Objective``, in full precision; afterwards all is as it was.

    Works inside ``torch.no_grad()``, ``torch.inference_mode()`` and autocast.
    """
    modules = list(model.modules())
    training = [module for module in modules if module.training]
    compiled = any(module._compiled_call_impl is not None or hasattr(module, "_orig_mod") for module in modules)
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device in {"cpu", *(p.device.type for p in model.parameters())} - {"meta"}:
            stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(no_tf32())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # the fused forms have no second derivative
        if compiled:  # nor has compiled code
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.callback(_train, training)
        model.eval()
        yield Objective(model, loss_fn, loader, parameters, l2)


class _Call(nn.Module):
    """A function of a model as a module, so that ``functional_call`` can put the parameters in."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[nn.Module, Any], Tensor], batch: Any) -> Tensor:
        return function(self.model, batch)


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _train(modules: list[nn.Module]) -> None:
    for module in modules:
        module.training = True
