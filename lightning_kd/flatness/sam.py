"""Sharpness-aware minimisation (SAM) as an optimizer, around any optimizer that makes the step.

Pierre Foret, Ariel Kleiner, Hossein Mobahi, Behnam Neyshabur. Sharpness-Aware Minimization for Efficiently Improving
Generalization. ICLR 2021, arXiv 2010.01412.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.two_pass_step import FirstPass
from lightning_kd.flatness._sam_checks import check_accumulation, check_gradients, check_trainer

__all__ = ["SAM"]


class SAM(Optimizer):
    """Sharpness-aware minimisation (Foret et al., ICLR 2021, arXiv 2010.01412, algorithm 1).

    SAM looks for weights in whose whole neighbourhood the loss is low. Each step evaluates the batch twice: it moves
    the weights uphill to the (approximately) worst point within the distance ``rho``, takes the gradient there, and
    makes an ordinary optimizer step with it from the original weights.

    In formulas: with the gradient ``g`` at the weights ``w``, the second gradient is taken at
    ``w + rho g / (|g| + 1e-12)``; then ``w`` is restored exactly, and ``base_optimizer`` steps with the second
    gradient. The norm is over all parameters together. Weight decay of the base optimizer acts at ``w`` and is not part
    of ``g``. With ``rho = 0`` the results are exactly those of the base optimizer.

    In a LightningModule with automatic optimization it is an optimizer like any other: no callback, no change of the
    module. Each step counts once in ``global_step``. Logged values, running statistics of normalisation layers,
    ``torchmetrics`` of the module and the returned loss are those of the first evaluation; both evaluations have the
    same dropout masks. Hooks such as ``on_after_backward`` and counters of your own run twice:
    ``lightning_kd.core.two_pass_step.second_pass()`` tells which one it is. Gradients are clipped by norm in both
    evaluations, which does not change the uphill step. Precision 32, 64 and bf16.

    Several processes (DDP): each moves uphill by the gradient of its own batch, as in the paper, and only the second
    gradient is averaged; parameters stay equal on all.

    In a plain loop ``step`` takes a closure that zeroes the gradients, evaluates the loss, calls ``backward`` and
    returns the loss (as for LBFGS). Give the model as second argument, so that its buffers and metrics are updated
    once::

        optimizer = SAM(model.parameters(), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), rho=0.05)
        optimizer.step(closure, model)

    ``state`` and ``param_groups`` are those of the base optimizer, so schedulers, checkpoints and resuming work as with
    the base optimizer alone.

    Random numbers: the second evaluation draws the same numbers from torch's generators, and from NumPy generators that
    are attributes of the module, such as those that mix images; not from the global ones of NumPy and Python.

    Args:
        params: parameters or groups of them (which may have a ``rho`` of their own), on one device.
        base_optimizer: factory from the parameters to the optimizer that makes the step, such as ``torch.optim.SGD`` or
            a ``functools.partial`` of it; in YAML ``class_path`` and ``init_args``.
        rho: length of the uphill step, at least 0. 0.05 suits CIFAR-10, 0.1 CIFAR-100.
        average_first_pass: average the first gradient over processes too, so that all move uphill alike. The paper does
            not do this, and it is usually worse.

    Raises:
        ValueError: for a negative ``rho``, LBFGS as base, or ``step`` without a closure (as under ``16-mixed``).
        TypeError: for sparse or complex gradients.
        RuntimeError: for a first gradient that is not finite (checked on a CPU alone, as the check would make a GPU
            wait), or a Trainer with manual optimization, ``accumulate_grad_batches`` above 1, clipping by value, a
            sharding strategy or DDP with ``static_graph``.
    """

    _tiny = 1e-12  # added to the norm

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: OptimizerCallable,
        rho: float = 0.05,
        average_first_pass: bool = False,
    ) -> None:
        self._setup(params, base_optimizer, average_first_pass, rho=rho)

    def _setup(self, params: ParamsT, base: OptimizerCallable, average_first_pass: bool, **own: float) -> None:
        """Build the base optimizer and share its state; ``own`` are SAM's own settings of each parameter group."""
        check_numbers(own, least=0)
        self.base_optimizer = base(params)
        if isinstance(self.base_optimizer, (torch.optim.LBFGS, SAM)):
            raise ValueError(
                f"{type(self).__name__} cannot step by {type(self.base_optimizer).__name__}, which evaluates the loss "
                "itself: choose a base_optimizer such as SGD or AdamW"
            )
        super().__init__(self.base_optimizer.param_groups, {**self.base_optimizer.defaults, **own})
        self._share()
        self.average_first_pass = average_first_pass

    def _share(self) -> None:
        self.state, self.param_groups = self.base_optimizer.state, self.base_optimizer.param_groups

    def __getstate__(self) -> dict[str, Any]:
        return vars(self).copy()  # torch's version would leave out the base optimizer

    def state_dict(self) -> dict[str, Any]:
        return self.base_optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.base_optimizer.load_state_dict(state_dict)
        self._share()  # loading replaced both containers
        for group in self.param_groups:  # a checkpoint of the base optimizer alone has no rho
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], Any] | None = None, module: nn.Module | None = None
    ) -> Any:
        """One step with two evaluations of ``closure``.

        Args:
            closure: zeroes gradients, evaluates the loss on the batch, calls ``backward``, returns the loss.
            module: in a plain loop, the model; under Lightning it is found from the closure.

        Returns:
            The result of the first evaluation.
        """
        name = type(self).__name__
        if closure is None:
            raise ValueError(
                f"{name} evaluates the batch twice, got step() without a closure: give one; under Lightning use "
                "precision bf16-mixed or 32, since 16-mixed passes none"
            )
        task = _module_of(closure)
        if task is not None:
            check_trainer(task.trainer, task, name)
            module = task
        device = next((p.device for group in self.param_groups for p in group["params"]), torch.device("cpu"))
        first = FirstPass(module, device)
        self.zero_grad()
        with torch.enable_grad(), self._alone(module, task):
            loss = closure()
        if all(p.grad is None for group in self.param_groups for p in group["params"]):
            self.base_optimizer.step()  # no gradients: SWA gathers statistics without backward
            return loss
        if task is not None:
            check_accumulation(task.trainer, name)
        inner: Any = closure.args[2] if task is not None else None  # type: ignore[attr-defined]
        result = getattr(inner, "_result", None)
        parameters, kept = self._climb(module)
        try:
            self.zero_grad()
            with torch.enable_grad(), first.repeated():
                closure()
        finally:
            if parameters:
                torch._foreach_copy_(parameters, kept)
        if result is not None:
            inner._result = result  # Lightning passes it on as the outputs of the step
        self.base_optimizer.step()
        return loss

    def _alone(self, module: nn.Module | None, task: L.LightningModule | None) -> AbstractContextManager[Any]:
        """A context in which gradients are not averaged over processes, unless ``average_first_pass``."""
        parallel = module if task is None else task.trainer.strategy.model
        if self.average_first_pass or not isinstance(parallel, DistributedDataParallel):
            return nullcontext()
        if parallel.static_graph:
            raise RuntimeError(
                f"{type(self).__name__} leaves the first gradient of each process alone, which DDP cannot with "
                "static_graph=True: set it to False, or average_first_pass=True"
            )
        return parallel.no_sync()

    def _climb(self, module: nn.Module | None) -> tuple[list[Tensor], list[Tensor]]:
        """Move the weights uphill, overwriting their gradients; returns the moved parameters and their old values."""
        parts = []
        parameters: list[Tensor] = []
        norms: list[Tensor] = []
        for group in self.param_groups:
            moved = [p for p in group["params"] if p.grad is not None]
            if moved:
                gradients = [p.grad for p in moved]
                check_gradients(gradients, type(self).__name__)
                stretch = self._stretch(group, moved, module)
                if stretch[0]:
                    torch._foreach_mul_(*stretch)
                wide = torch.float64 if any(g.dtype == torch.float64 for g in gradients) else torch.float32
                norms += torch._foreach_norm(gradients, 2, dtype=wide)
                parts.append((group["rho"], moved, gradients, stretch))
                parameters += moved
        if not parts:
            return [], []
        norm = torch.linalg.vector_norm(torch.stack(norms))
        if norm.device.type == "cpu" and not norm.isfinite():
            raise RuntimeError(
                f"the first gradient of {type(self).__name__} is not finite (norm {norm.item()}): check the inputs, or "
                "start anew with a lower learning rate"
            )
        kept = [torch.empty_like(parameter) for parameter in parameters]
        torch._foreach_copy_(kept, parameters)
        for rho, moved, gradients, stretch in parts:
            if stretch[0]:
                torch._foreach_mul_(*stretch)
            torch._foreach_mul_(gradients, rho / (norm + self._tiny))
            torch._foreach_add_(moved, gradients)
        torch.clear_autocast_cache()  # autocast would reuse its copies of the old weights
        return parameters, kept

    def _stretch(
        self, group: dict[str, Any], parameters: list[Tensor], module: nn.Module | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Gradients of the parameters with a scale ``T`` other than 1, and their ``T``; none in SAM, see ``ASAM``."""
        return [], []


def _module_of(closure: Callable[[], Any]) -> L.LightningModule | None:
    """The LightningModule of a Trainer's closure, which the precision plugin binds as its first argument."""
    bound = closure.args if isinstance(closure, partial) else ()
    return bound[0] if len(bound) == 3 and isinstance(bound[0], L.LightningModule) else None
