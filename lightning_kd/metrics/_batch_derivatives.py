"""The loss of each batch, and its first and second derivatives with respect to a network's parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_kd.core.batch import batch_size
from lightning_kd.core.outputs import logits_of
from lightning_kd.core.random_state import same_random_state
from lightning_kd.metrics._functional_network import Copies
from lightning_kd.metrics._second_derivatives import FastSecondDerivatives

LossFn = Callable[[nn.Module, Any], Tensor]

# Autograd graphs of batches are kept between Hessian-vector products, up to this many bytes in all: a kept graph saves
# a third to a half of the work. The graphs of further batches are rebuilt for every product.
KEPT_BYTES = 2**31


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    """Mean cross-entropy of the logits that ``model(batch[0])`` gives, on the targets ``batch[1]``."""
    return F.cross_entropy(logits_of(model(batch[0])), batch[1])


class BatchDerivatives(Copies):
    """Losses, gradients and Hessian-vector products of single batches, on copies of a network's parameters.

    Autograd graphs of batches are kept for the next product, up to ``KEPT_BYTES``.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFn | None, loader: Any, parameters: Sequence[str] | None) -> None:
        super().__init__(model, loader, parameters)
        self.loss_fn = loss_fn or cross_entropy
        self._kept: list[tuple[int, float, list[tuple[int, Tensor]]]] = []
        self._kept_bytes = 0
        self._full = False
        self._kept_all = False

    def checked_loss(self, loss: Tensor) -> Tensor:
        """``loss`` as it is; ValueError where it is not a scalar tensor."""
        if not isinstance(loss, Tensor) or loss.ndim:
            got = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"loss_fn must give the mean loss of a batch as a scalar tensor, got {got}")
        return loss

    def batch_gradients(
        self, number: int, batch: Any, create_graph: bool
    ) -> tuple[int, float, list[tuple[int, Tensor]]]:
        """Size of a batch, its loss, and pairs of a parameter's index in ``leaves`` and the gradient.

        Parameters that the loss does not depend on are left out.
        """
        with FastSecondDerivatives() if create_graph else nullcontext():
            loss = self.checked_loss(self.run(self.loss_fn, self.leaves, number, batch))
        if not loss.requires_grad:
            raise ValueError("the loss does not depend on the parameters: give a loss_fn that is computed from them")
        found = torch.autograd.grad(loss, self.leaves, create_graph=create_graph, allow_unused=True)
        return batch_size(batch), float(loss.detach()), [(k, g) for k, g in enumerate(found) if g is not None]

    def batch_graphs(self) -> Iterator[tuple[int, float, list[tuple[int, Tensor]], bool]]:
        """Size, loss and differentiable gradients of each batch, and whether to retain the batch's graph."""
        for size, loss, gradients in self._kept:
            yield size, loss, gradients, True
        if self._kept_all:
            return
        with same_random_state(self.device):
            for number, batch in self.batches():
                if number < len(self._kept):
                    continue
                if not self._full:
                    with saved_bytes(self._ignored) as count:
                        size, loss, gradients = self.batch_gradients(number, batch, create_graph=True)
                    self._kept_bytes += count[0]
                    self._full = self._kept_bytes > KEPT_BYTES
                    if not self._full:
                        self._kept.append((size, loss, gradients))
                    yield size, loss, gradients, not self._full
                else:
                    yield *self.batch_gradients(number, batch, create_graph=True), False
        self._kept_all = not self._full

    def batch_product(
        self, gradients: list[tuple[int, Tensor]], parts: list[Tensor], keep: bool
    ) -> list[tuple[int, Tensor]]:
        """The batch's Hessian times ``parts``, by index of the parameter; a parameter left out has product zero."""
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

    @property
    def _ignored(self) -> set[int]:
        return {tensor.untyped_storage().data_ptr() for tensor in [*self.leaves, *self.fixed.values()]}


@contextmanager
def saved_bytes(ignored: set[int]) -> Iterator[list[int]]:
    """Counts the bytes of the tensors that autograd saves for backward in this block.

    Args:
        ignored: ``data_ptr`` of storages that do not count, such as the parameters'.

    Yields:
        A list of one number: the count so far.
    """
    count, seen = [0], set(ignored)

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            count[0] += storage.nbytes()
        return tensor.detach()  # an undetached output refers to the graph that saves it: the cycle would leak memory

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield count
