"""Annealed gradient noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.seeding import stream_seed, torch_generator
from lightning_kd.core.two_pass_step import second_pass
from lightning_kd.flatness.sam import SAM

__all__ = ["GradientNoise", "add_gradient_noise", "noise_scale"]


def noise_scale(step: int, eta: float = 0.3, gamma: float = 0.55) -> float:
    """The standard deviation of the noise: ``sqrt(eta / (1 + step) ** gamma)``.

    Args:
        step: number of optimizer steps already made, from 0.
        eta: the variance at step 0, at least 0.
        gamma: how fast the variance falls.

    Raises:
        ValueError: for a negative ``step``, ``eta`` or ``gamma``.

    Source: Neelakantan et al., arXiv 1511.06807.
    """
    check_numbers(least=0, whole=True, step=step)
    check_numbers(least=0, eta=eta, gamma=gamma)
    return math.sqrt(eta / (1 + step) ** gamma)


@torch.no_grad()
def add_gradient_noise(
    parameters: Iterable[Tensor], step: int, eta: float, gamma: float, generator: torch.Generator
) -> None:
    """Add independent normal noise of ``noise_scale(step, eta, gamma)`` to every entry of every gradient, in place.

    Parameters without a gradient are passed over, and draw nothing; with ``eta`` 0 nothing is drawn at all.

    Args:
        parameters: whose ``grad`` is changed, in this order.
        step: see ``noise_scale``.
        eta: see ``noise_scale``.
        gamma: see ``noise_scale``.
        generator: on the device of the parameters; unit normals in the shape and dtype of each gradient.

    Raises:
        ValueError: see ``noise_scale``.
        TypeError: for a sparse gradient.

    Source: Neelakantan et al., arXiv 1511.06807.
    """
    scale = noise_scale(step, eta, gamma)
    gradients = [p.grad for p in parameters if p.grad is not None]
    if any(g.layout != torch.strided for g in gradients):
        raise TypeError("gradient noise takes dense gradients, got a sparse one: set sparse=False in the embedding")
    if scale and gradients:
        unit = [torch.randn(g.shape, generator=generator, dtype=g.dtype, device=g.device) for g in gradients]
        torch._foreach_add_(gradients, unit, alpha=scale)


class GradientNoise(L.Callback):
    """Add annealed normal noise to the gradients of each optimizer step (Neelakantan et al., arXiv 1511.06807).

    Its variance is ``eta / (1 + t) ** gamma`` at optimizer step ``t``, counted from 0 over the whole run. It comes
    after gradient clipping and, in 16-mixed, after unscaling; with ``SAM`` or ``ASAM`` to the second gradient alone.
    All processes add the same noise.

    The noise of a step comes from ``seed`` (and the one of ``seed_everything``, where there is one) and the number of
    the step: it disturbs no other random numbers, nothing of it is in checkpoints and a resumed run goes on to the bit.

    Args:
        eta: variance at the first step; the paper tried 0.01, 0.3 and 1.0. 0 does nothing at all.
        gamma: how fast the variance falls.
        seed: of the noise.

    Raises:
        ValueError: for a negative ``eta``, ``gamma`` or ``seed``.
        RuntimeError: where a module has manual optimization, which Lightning clips nothing in.
        TypeError: for a sparse gradient.
    """

    def __init__(self, eta: float = 0.3, gamma: float = 0.55, seed: int = 0) -> None:
        check_numbers(least=0, eta=eta, gamma=gamma)
        check_numbers(least=0, whole=True, seed=seed)
        self.eta = eta
        self.gamma = gamma
        self.seed = seed
        self._undo: Callable[[], None] | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not pl_module.automatic_optimization:
            raise RuntimeError(
                f"GradientNoise needs automatic optimization, got {type(pl_module).__name__} with its own: call "
                "add_gradient_noise before its optimizer steps"
            )
        if sum(isinstance(c, GradientNoise) for c in trainer.callbacks) > 1:  # type: ignore[attr-defined]
            raise RuntimeError("there are two GradientNoise callbacks, whose variances would add up: give one")
        seed, own = stream_seed(self.seed), vars(pl_module).get("configure_gradient_clipping")
        clip = pl_module.configure_gradient_clipping

        def clip_and_add(optimizer: Any, *args: Any, **kwargs: Any) -> None:
            clip(optimizer, *args, **kwargs)
            climbing = isinstance(optimizer, SAM) and not second_pass()
            if self.eta and not climbing:
                parameters = [p for group in optimizer.param_groups for p in group["params"]]
                generator = torch_generator(seed, "gradient noise", trainer.global_step, device=parameters[0].device)
                add_gradient_noise(parameters, trainer.global_step, self.eta, self.gamma, generator)

        def undo() -> None:
            del pl_module.configure_gradient_clipping
            if own is not None:
                pl_module.configure_gradient_clipping = own  # type: ignore[method-assign]

        # Lightning has no hook between clipping and the step but this one of the module
        pl_module.configure_gradient_clipping = clip_and_add  # type: ignore[method-assign]
        self._undo = undo

    def _remove(self) -> None:
        if self._undo is not None:
            self._undo()
            self._undo = None

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._remove()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._remove()
