"""The mean loss of a network over data as a function of its parameters, with first and second derivatives.

The network stays unchanged: it runs on copies of its parameters and buffers.
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
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_kd.core.batch import batch_size
from lightning_kd.core.distributed import gather_rows, process_count, sum_of_parts, together
from lightning_kd.core.module_modes import eval_mode
from lightning_kd.core.outputs import logits_of
from lightning_kd.core.precision import no_tf32
from lightning_kd.core.random_state import same_random_state
from lightning_kd.metrics._batch_derivatives import BatchDerivatives, LossFn


@dataclass(frozen=True)
class Measured:
    """The conditions of a measurement, which every curvature result carries. The network was in eval mode.

    Attributes:
        loss: mean loss over all samples, plus the ``l2`` term where one is given.
        samples: number of samples over all processes.
        hvps: number of Hessian-vector products computed; each is one pass over all samples.
        dtype: of the computation, ``"float32"`` or ``"float64"``.
        parameters: names of the parameters that derivatives were taken with respect to.
    """

    loss: float
    samples: int
    hvps: int
    dtype: str
    parameters: list[str]


class Objective(BatchDerivatives):
    """The mean loss over all batches and processes, and its derivatives; ``objective`` creates it.

    Its methods are collective: every process must call the same ones in the same order. An error that one process
    raises inside a method is raised on all. Where a process is killed, or fails between two calls, the others wait
    until the process group's timeout.
    """

    def __init__(
        self, model: nn.Module, loss_fn: LossFn | None, loader: Any, parameters: Sequence[str] | None, l2: float
    ) -> None:
        super().__init__(model, loss_fn, loader, parameters)
        self.l2 = l2
        self.hvps = 0
        self.samples = 0
        self.loss = float("nan")

    # -- passes ------------------------------------------------------------------------------------------------------

    def evaluate(
        self,
        measure: Callable[[nn.Module, Any], Tensor],
        weights: Tensor | None = None,
        fixed: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """The sum of ``measure(network, batch)`` over all batches and processes, float64 ``[...]``, without gradients.

        Args:
            measure: gives a tensor that is summed over the samples of the batch.
            weights: ``[P]``, parameters to use. Default: the network's own.
            fixed: other parameters and buffers to use. Default: ``self.fixed``.
        """
        leaves = self.leaves if weights is None else self.split(weights)
        total: Tensor | None = None
        with together(self.device), same_random_state(self.device), torch.no_grad():
            for number, batch in self.batches():
                part = self.run(measure, leaves, number, batch, fixed).to(self.sums_dtype)
                total = part if total is None else total + part
        return sum_of_parts(total, self.sums_dtype, self.device)

    def collect(self, measure: Callable[[nn.Module, Any], Sequence[Tensor]]) -> list[Tensor]:
        """Tensors ``[B, ...]`` that ``measure`` gives for a batch, concatenated over batches and processes, on the CPU.

        Empty where ``measure`` gives an empty list for any batch.
        """
        rows: list[Sequence[Tensor]] = []

        def keep(model: nn.Module, batch: Any) -> Tensor:
            rows.append([part.detach().cpu() for part in measure(model, batch)])
            return torch.zeros((), device=self.device)

        self.evaluate(keep)
        rows = gather_rows(rows)
        return [torch.cat(column) for column in zip(*rows, strict=True)] if all(rows) else []

    def value(self, weights: Tensor | None = None, fixed: dict[str, Tensor] | None = None) -> float:
        """The mean loss at ``weights``. Default: at the network's own, where it must equal that of earlier passes."""

        def measure(model: nn.Module, batch: Any) -> Tensor:
            size = batch_size(batch)
            loss = self.checked_loss(self.loss_fn(model, batch)).to(self.sums_dtype)
            return torch.stack([loss * size, loss.new_tensor(size)])

        total, samples = self.evaluate(measure, weights, fixed).tolist()
        if weights is None:
            return self._record_loss(total, samples)
        return total / samples + self.l2 / 2 * float(weights.double().square().sum())

    def gradient(self) -> Tensor:
        """The gradient of the mean loss, ``[P]``."""
        total = torch.zeros_like(self.weights)
        sums = [0.0, 0.0]
        with together(self.device), same_random_state(self.device):
            for number, batch in self.batches():
                size, loss, gradients = self.batch_gradients(number, batch, create_graph=False)
                self._add(total, gradients, size)
                sums = [sums[0] + size * loss, sums[1] + size]
        return self._mean(total, sums) + self.l2 * self.weights

    def hvp(self, vector: Tensor) -> Tensor:
        """The Hessian of the mean loss times ``vector`` ``[P]``."""
        parts = self.split(vector)
        total = torch.zeros_like(self.weights)
        sums = [0.0, 0.0]
        with together(self.device):
            for size, loss, gradients, keep in self.batch_graphs():
                self._add(total, self.batch_product(gradients, parts, keep), size)
                sums = [sums[0] + size * loss, sums[1] + size]
        self.hvps += 1
        return self._mean(total, sums) + self.l2 * vector

    def quadratic_forms(self, vectors: Sequence[Tensor]) -> Tensor:
        """``v^T H v`` for each vector ``v`` ``[P]``, the part of each parameter in a column of its own.

        All vectors share one graph of each batch, and processes exchange only these sums.

        Returns:
            float64 ``[len(vectors), len(names)]`` on the CPU.
        """
        forms = torch.zeros(len(vectors), len(self.names), dtype=self.sums_dtype, device=self.device)
        sums = [0.0, 0.0]
        with together(self.device):
            for size, loss, gradients, keep in self.batch_graphs():
                for i, vector in enumerate(vectors):
                    parts = self.split(vector)
                    products = self.batch_product(gradients, parts, keep or i < len(vectors) - 1)
                    for k, product in products:
                        forms[i, k] += size * (parts[k] * product).sum(dtype=self.sums_dtype)
                sums = [sums[0] + size * loss, sums[1] + size]
        self.hvps += len(vectors)
        forms = self._mean(forms, sums).double().cpu()
        if self.l2:
            squares = [[part.double().square().sum() for part in self.split(vector)] for vector in vectors]
            forms += self.l2 * torch.tensor(squares, dtype=torch.float64)
        return forms

    def gradient_forms(self, cotangents: Callable[[int, Tensor], Iterable[tuple[int, Tensor]]], rows: int) -> Tensor:
        """Squared norms of vector-Jacobian products of the network's output, divided by the number of samples.

        Args:
            cotangents: called with the number of a batch and the network's output for ``batch[0]``. Gives pairs of a
                row of the result, to which the squared norm is added, and the vector: a tensor shaped like the output.
            rows: number of rows of the result.

        Returns:
            float64 ``[rows, len(names)]`` on the CPU, the part of each parameter in a column of its own.
        """
        forms = torch.zeros(rows, len(self.names), dtype=self.sums_dtype, device=self.device)
        sums = [0.0, 0.0]
        with together(self.device), same_random_state(self.device):
            for number, batch in self.batches():
                output = self.run(lambda model, batch: logits_of(model(batch[0])), self.leaves, number, batch)
                loss, size = F.cross_entropy(output.detach(), batch[1]), batch_size(batch)
                for i, given in cotangents(number, output.detach()):
                    found = torch.autograd.grad(output, self.leaves, given, retain_graph=True, allow_unused=True)
                    for k, gradient in enumerate(found):
                        if gradient is not None:
                            forms[i, k] += gradient.square().sum(dtype=self.sums_dtype)
                sums = [sums[0] + size * float(loss), sums[1] + size]
        return self._mean(forms, sums).double().cpu()

    def measured(self) -> dict[str, Any]:
        """Values for the fields of ``Measured``."""
        dtype = str(self.dtype).removeprefix("torch.")
        return {
            "loss": self.loss, "samples": self.samples, "hvps": self.hvps, "dtype": dtype, "parameters": self.names,
        }  # fmt: skip

    # -- helpers -----------------------------------------------------------------------------------------------------

    def _add(self, total: Tensor, parts: list[tuple[int, Tensor]], size: int) -> None:
        places = total.split(self.sizes)
        for k, part in parts:
            places[k].add_(part.reshape(-1), alpha=size)

    def _mean(self, total: Tensor, sums: list[float]) -> Tensor:
        """``total`` summed over processes and divided by the number of samples; also records the mean loss."""
        both = torch.tensor(sums, dtype=self.sums_dtype, device=self.device)
        if process_count() > 1:
            dist.all_reduce(both)
            dist.all_reduce(total)
        loss, samples = both.tolist()
        self._record_loss(loss, samples)
        return total.div_(samples)

    def _record_loss(self, total: float, samples: float) -> float:
        """Store and return the mean loss of a pass; ValueError where it is not finite or differs between passes."""
        if not samples:
            raise ValueError("loader gave no sample: give at least one")
        loss = total / samples + self.l2 / 2 * float(self.weights.double().square().sum())
        if not np.isfinite(loss):
            raise ValueError(f"the loss is {loss}: check the weights of the network and the data for infinite or NaN")
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
    """The ``Objective`` of a network in eval mode and full precision; modes and settings are restored afterwards.

    Works inside ``torch.no_grad()``, ``torch.inference_mode()`` and autocast.
    """
    modules = list(model.modules())
    compiled = any(module._compiled_call_impl is not None or hasattr(module, "_orig_mod") for module in modules)
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device in {"cpu", *(p.device.type for p in model.parameters())} - {"meta"}:
            stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(no_tf32())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # fused attention has no second derivative
        if compiled:  # compiled code has none either
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(eval_mode(model))
        with together(next((p.device for p in model.parameters()), torch.device("cpu"))):
            found = Objective(model, loss_fn, loader, parameters, l2)
        found.share_buffers(model)
        yield found
