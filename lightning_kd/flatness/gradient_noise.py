"""Annealed gradient noise, added to the gradients of each optimizer step.

Arvind Neelakantan, Luke Vilnis, Quoc V. Le, Ilya Sutskever, Lukasz Kaiser, Karol Kurach, James Martens. Adding Gradient
Noise Improves Learning for Very Deep Networks. 2015, arXiv 1511.06807.
"""

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
        gamma: exponent of the decay of the variance, at least 0.

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

    For parameters without a gradient, and with ``eta`` 0, no random numbers are drawn.

    Args:
        parameters: the parameters whose ``grad`` is changed; random numbers are drawn in this order.
        step: see ``noise_scale``.
        eta: see ``noise_scale``.
        gamma: see ``noise_scale``.
        generator: a generator on the device of the parameters; it draws in the shape and dtype of each gradient.

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
    """Add normal noise to the gradients of each optimizer step (Neelakantan et al., 2015, arXiv 1511.06807).

    Noise early in the training helps to leave poor regions of the loss; it decreases ("anneals") so that the training
    converges. It works with any LightningModule and optimizer.

    The variance at optimizer step ``t``, counted from 0 over the whole run, is ``eta / (1 + t) ** gamma``. Noise is
    added after gradient clipping and, in 16-mixed, after unscaling; with ``SAM`` or ``ASAM`` to the second gradient
    alone. All processes add the same noise.

    The noise depends on ``seed``, on the seed of ``seed_everything`` and on the number of the step alone. Other random
    numbers do not change, checkpoints need no state, and a resumed run has exactly the same noise.

    Args:
        eta: variance at the first step; the paper tried 0.01, 0.3 and 1.0. With 0 there is no noise.
        gamma: exponent of the decay of the variance.
        seed: seed of the noise.

    Raises:
        ValueError: for a negative ``eta``, ``gamma`` or ``seed``.
        RuntimeError: at the start of a fit, for a module with manual optimization or a second such callback.
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
                f"GradientNoise needs automatic optimization, got {type(pl_module).__name__} with manual optimization: "
                "call add_gradient_noise before its optimizer steps"
            )
        if sum(isinstance(c, GradientNoise) for c in trainer.callbacks) > 1:  # type: ignore[attr-defined]
            raise RuntimeError("there are several GradientNoise callbacks, whose variances would add up: give one")
        seed, own = stream_seed(self.seed), vars(pl_module).get("configure_gradient_clipping")
        clip = pl_module.configure_gradient_clipping

        def clip_and_add(optimizer: Any, *args: Any, **kwargs: Any) -> None:
            clip(optimizer, *args, **kwargs)
            is_first_pass = isinstance(optimizer, SAM) and not second_pass()
            if self.eta and not is_first_pass:
                parameters = [p for group in optimizer.param_groups for p in group["params"]]
                generator = torch_generator(seed, "gradient noise", trainer.global_step, device=parameters[0].device)
                add_gradient_noise(parameters, trainer.global_step, self.eta, self.gamma, generator)

        def undo() -> None:
            del pl_module.configure_gradient_clipping
            if own is not None:
                pl_module.configure_gradient_clipping = own  # type: ignore[method-assign]

        # the module's clipping is the only hook of Lightning between clipping and the step
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
