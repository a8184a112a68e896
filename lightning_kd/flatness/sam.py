"""Sharpness-aware minimisation by an optimizer, with any optimizer for the step itself."""

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

    A step takes the gradient ``g`` of the batch at the weights ``w``, goes up to ``w + rho g / (|g| + 1e-12)``, takes
    the gradient of the same batch there, puts ``w`` back to the bit and lets ``base_optimizer`` step with the second
    gradient. The norm is over all parameters together. Weight decay of the base optimizer acts at ``w`` and is not part
    of ``g``. ``rho = 0`` is the base optimizer to the bit.

    In a LightningModule with automatic optimization it is an optimizer like any other: no callback, no change of the
    module. Each step counts once in ``global_step``; what is logged, the running statistics of normalisation layers,
    ``torchmetrics`` of the module and the loss given on belong to the first evaluation; both see the same dropout mask.
    Hooks such as ``on_after_backward`` and further counters of a module run twice: ask
    ``lightning_kd.core.two_pass_step.second_pass()`` there. Gradients are clipped by norm in both evaluations, which
    leaves the way up as it is. Precision 32, 64 and bf16.

    Several processes (DDP): each goes up by the gradient of its own batch, as in the paper, and only the second
    gradient is averaged; parameters stay equal on all.

    In a plain loop ``step`` takes a closure that zeroes the gradients, evaluates the loss, calls ``backward`` and
    returns the loss (as LBFGS does), and the model as second argument, if its buffers and metrics shall count once::

        optimizer = SAM(model.parameters(), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), rho=0.05)
        optimizer.step(closure, model)

    Momentum and all else of the base optimizer are in ``state`` and ``param_groups``, which are its own: schedulers,
    checkpoints and resuming work as with it alone.

    Random numbers: torch's generators are repeated in the second evaluation, and so are NumPy generators that the
    module holds, such as those that mix images; the global ones of NumPy and Python are not.

    Args:
        params: parameters or groups of them (which may have a ``rho`` of their own), on one device.
        base_optimizer: factory from the parameters to the optimizer that steps, such as ``torch.optim.SGD`` or a
            ``functools.partial`` of it; in YAML ``class_path`` and ``init_args``.
        rho: radius, at least 0. 0.05 suits CIFAR-10, 0.1 CIFAR-100.
        average_first_pass: average the first gradient over processes too: one common way up, another method than the
            paper's and usually a weaker one.

    Raises:
        ValueError: for a negative ``rho``, LBFGS as base, or a ``step`` without closure (so under ``16-mixed``).
        TypeError: for sparse or complex gradients.
        RuntimeError: for a first gradient that is not finite (on a CPU; a GPU is not waited for), or a Trainer with
            manual optimization, ``accumulate_grad_batches`` above 1, clipping by value, a sharding strategy or DDP with
            ``static_graph``.
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
        """Build the base optimizer and share everything with it; ``own`` are further settings of each group."""
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
        return vars(self).copy()  # the base optimizer too, which torch's would leave out

    def state_dict(self) -> dict[str, Any]:
        return self.base_optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.base_optimizer.load_state_dict(state_dict)
        self._share()  # torch puts new containers there
        for group in self.param_groups:  # a checkpoint of the base optimizer alone has no radius
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], Any] | None = None, module: nn.Module | None = None
    ) -> Any:
        """One step by two evaluations of ``closure``.

        Args:
            closure: zeroes gradients, evaluates the loss on the batch, calls ``backward``, returns the loss.
            module: in a plain loop, the model; Lightning's closure tells its own.

        Returns:
            What the first evaluation returned.
        """
        name = type(self).__name__
        if closure is None:
            raise ValueError(
                f"{name} evaluates the batch twice, got step() without a closure: give one, and under Lightning use "
                "precision bf16-mixed or 32, as 16-mixed passes none"
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
            self.base_optimizer.step()  # nothing to climb by, as where SWA gathers statistics without backward
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
            inner._result = result  # what Lightning hands on as the outputs of the step
        self.base_optimizer.step()
        return loss

    def _alone(self, module: nn.Module | None, task: L.LightningModule | None) -> AbstractContextManager[Any]:
        """Without averaging gradients over processes."""
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
        """Move the weights up, using their gradients as scratch; returns the parameters and what they were."""
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
        torch.clear_autocast_cache()  # autocast around the step would go on with the weights as they were
        return parameters, kept

    def _stretch(
        self, group: dict[str, Any], parameters: list[Tensor], module: nn.Module | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Gradients of those parameters whose scale ``T`` is not 1, and ``T`` of each."""
        return [], []


def _module_of(closure: Callable[[], Any]) -> L.LightningModule | None:
    """The LightningModule that a Trainer's closure evaluates: its precision plugin binds it in front."""
    bound = closure.args if isinstance(closure, partial) else ()
    return bound[0] if len(bound) == 3 and isinstance(bound[0], L.LightningModule) else None
