"""Recording the inputs of layers in a pass that changes nothing in the network, on one process or several."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_kd.core.distributed import is_first_process, process_count, process_rank, share_buffers, summed
from lightning_kd.core.module_modes import eval_mode
from lightning_kd.core.precision import no_tf32
from lightning_kd.core.random_state import same_random_state
from lightning_kd.flatness._row_space import (
    Projector,
    default_rtol,
    patches,
    projector_of_gram,
    projector_of_rows,
    wide,
)


def _gathered(rows: Tensor, counts: list[int]) -> Tensor:
    """Gather ``rows`` ``[G, n, d]`` of all processes, whose numbers ``n`` are ``counts``."""
    if process_count() == 1:
        return rows
    most = max(counts)
    padded = rows.new_zeros(rows.shape[0], most, rows.shape[2])
    padded[:, : rows.shape[1]] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:, :n] for part, n in zip(parts, counts, strict=True)], 1)


def _of_process_0(projector: Projector, device: torch.device) -> Projector:
    """The projector of process 0, for all: near the threshold, rounding could give processes different ranks."""
    if process_count() == 1:
        return projector
    basis = projector.basis
    sizes = torch.tensor([projector.rank, *((0, 0) if basis is None else basis.shape)], device=device)
    dist.broadcast(sizes, 0)
    rank, rows, columns = sizes.tolist()
    basis = basis if basis is not None and is_first_process() else torch.empty(rows, columns, device=device).double()
    basis = basis.contiguous()
    if basis.numel():
        dist.broadcast(basis, 0)
    return Projector(basis if rows else None, rank, projector.mode, projector.mean)


class LayerInputs:
    """The inputs of one layer: the rows themselves if there are at most as many as their dimension, else sums of them.

    Args:
        name: the layer's module path, for messages.
        module: an ``nn.Linear`` or ``nn.Conv2d``.
        num_classes: if given, the rows are the mean inputs of the classes.

    Attributes:
        groups: groups of a convolution, 1 otherwise.
        dim: dimension of a row.
        calls: number of calls of the layer on this process.
        target: int64 ``[N]``, the targets of the current batch, for class means.
    """

    def __init__(self, name: str, module: nn.Linear | nn.Conv2d, num_classes: int | None = None) -> None:
        self.name, self.module = name, module
        self.groups = module.groups if isinstance(module, nn.Conv2d) else 1
        self.dim = module.weight[0].numel()
        self.calls = 0
        self.target: Tensor | None = None
        self._dtype = module.weight.dtype
        like = wide(module.weight)
        self._finite = torch.ones((), dtype=torch.bool, device=like.device)
        self._rows: list[Tensor] = [like.new_empty(self.groups, 0, self.dim)]
        self._count = 0
        self._gram: Tensor | None = None
        self._total = like.new_zeros(self.groups, self.dim)
        self._of_class = None if num_classes is None else like.new_zeros(num_classes, self.dim + 1)

    def add(self, inputs: Tensor) -> None:
        """Add the inputs of one call of the layer."""
        self.calls += 1
        self._dtype = inputs.dtype
        self._finite &= inputs.isfinite().all().to(self._finite.device)
        if isinstance(self.module, nn.Conv2d):
            m = self.module
            size = (m.kernel_size[0], m.kernel_size[1])
            rows = wide(patches(inputs, size, m.stride, m.padding, m.dilation, m.groups, m.padding_mode))
        else:
            rows = wide(inputs.reshape(1, -1, self.dim)).clone()  # later in-place operations must not change it
        if self._of_class is not None:
            self._add_to_classes(rows[0], inputs)
            return
        self._rows.append(rows)
        self._count += rows.shape[1]
        if self._count > self.dim:
            self._add_up()

    def _add_to_classes(self, rows: Tensor, inputs: Tensor) -> None:
        assert self._of_class is not None
        if (
            isinstance(self.module, nn.Conv2d)
            or inputs.ndim != 2
            or self.target is None
            or len(self.target) != len(rows)
        ):
            raise ValueError(
                f"class means need one input [N, d] of an nn.Linear for each target, got {list(inputs.shape)} at "
                f"{self.name!r}: choose another selection"
            )
        ones = rows.new_ones(len(rows), 1)
        self._of_class.index_add_(0, self.target.to(rows.device), torch.cat([rows, ones], 1))

    def _add_up(self) -> None:
        if self._gram is None:
            self._gram = self._total.new_zeros(self.groups, self.dim, self.dim)
        for rows in self._rows:
            self._gram.baddbmm_(rows.mT, rows)
            self._total += rows.sum(1)
        self._rows = [self._total.new_empty(self.groups, 0, self.dim)]

    def projectors(self, mode: str, rtol: float | None) -> tuple[list[Projector], int]:
        """One projector for each group, and the number of rows over all processes; all processes must call it.

        Raises:
            ValueError: if the layer was not called, or its inputs are not finite or of rank 0; with ``"free"`` one row,
                or equal rows, are of rank 0.
        """
        device = self._total.device
        # one small reduction: a table of the counts of all processes
        table = torch.zeros(process_count(), 3, dtype=torch.int64, device=device)
        mine = process_rank()
        table[mine] = torch.tensor([self._count, self.calls, int(not self._finite)])
        counts, calls, wrong = summed(table).T.tolist()
        if not sum(calls):
            raise ValueError(
                f"layer {self.name!r} was not called in the pass, so its inputs are unknown: name a layer that the "
                "forward calls as a module"
            )
        if any(wrong):
            raise ValueError(
                f"inputs of layer {self.name!r} must be finite, got NaN or infinity: look for where it diverged"
            )
        total = sum(counts)
        if self._of_class is not None:
            sums = summed(self._of_class)
            seen = sums[:, -1] > 0
            rows = (sums[seen, :-1] / sums[seen, -1:])[None]
            total = rows.shape[1]
        elif total <= self.dim:
            rows = _gathered(torch.cat(self._rows, 1), counts)
        if mode == "free" and total == 1:
            raise ValueError(f"mode 'free' with one row would make the weight of {self.name!r} 0: give more samples")
        if rtol is None:
            # the pass runs without TF32, so float32 has the same precision on every device
            rtol = default_rtol(total, self.dim, self._dtype, torch.device("cpu"))
        if self._of_class is not None or total <= self.dim:
            found = [projector_of_rows(group, mode, rtol) for group in rows]
        else:
            self._add_up()
            assert self._gram is not None
            summed(self._gram)
            summed(self._total)
            groups = zip(self._gram, self._total, strict=True)
            found = [projector_of_gram(gram, sums, total, mode, rtol) for gram, sums in groups]
        found = [_of_process_0(projector, device) for projector in found]
        if any(p.rank == 0 for p in found):
            raise ValueError(f"inputs of layer {self.name!r} have rank 0, which would make its weight 0: give others")
        return found, total


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """A context for a pass in eval mode and full precision, without gradient; it restores modes, buffers, random state.

    Within it the buffers are those of process 0, so that all processes use the same network.
    """
    device = next(model.parameters()).device
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with ExitStack() as stack:
        stack.enter_context(same_random_state(device))
        stack.enter_context(eval_mode(model))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        if any(getattr(m, "_compiled_call_impl", None) or hasattr(m, "_orig_mod") for m in model.modules()):
            stack.enter_context(torch.compiler.set_stance("force_eager"))  # compiled code would skip the new hooks
        if device.type == "cuda":
            stack.enter_context(no_tf32())
        stack.enter_context(_without_fast_path())
        try:
            share_buffers(model)
            yield
        finally:
            for buffer, old in buffers:
                buffer.copy_(old)


@contextmanager
def _without_fast_path() -> Iterator[None]:
    """Make torch's Transformer layers call their submodules: their fast path would skip the hooks."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
