"""Adaptive sharpness-aware minimisation: SAM on a scale of each weight's own."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from lightning_kd.flatness.sam import SAM

__all__ = ["ASAM"]


class ASAM(SAM):
    """Adaptive sharpness-aware minimisation (Kwon et al., ICML 2021, arXiv 2102.11600).

    SAM that goes up to ``w + rho T^2 g / (|T g| + 1e-16)``, a way that scales with the weights. By default ``T`` is
    ``|w| + eta`` for every parameter whose name contains "weight" (scales of normalisation layers among them) and 1 for
    the others, as in the authors' code. The names come from the LightningModule; in a plain loop give
    ``model.named_parameters()`` (torch 2.6) or the model to ``step``.

    Args:
        params: see ``SAM``.
        base_optimizer: see ``SAM``.
        rho: radius, at least 0. 0.5 suits CIFAR-10, 1.0 CIFAR-100; the elementwise form 2.0.
        eta: added to ``|w|``, at least 0. With 0, weights that are exactly 0 stay where they are on the way up.
        average_first_pass: see ``SAM``.
        elementwise: the other form in use: ``T = |w|`` for every parameter, biases too, without ``eta``. Of the two, it
            alone follows the rescaling of layers that have biases.

    Raises:
        ValueError: see ``SAM``; and where names are needed and unknown.
        TypeError: see ``SAM``.
        RuntimeError: see ``SAM``.
    """

    _tiny = 1e-16

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: OptimizerCallable,
        rho: float = 0.5,
        eta: float = 0.01,
        elementwise: bool = False,
        average_first_pass: bool = False,
    ) -> None:
        self._setup(params, base_optimizer, average_first_pass, rho=rho, eta=eta)
        self.elementwise = elementwise
        self._is_weight: dict[Tensor, bool] = {}

    def _stretch(
        self, group: dict[str, Any], parameters: list[Tensor], module: nn.Module | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        if not self.elementwise:
            if any(p not in self._is_weight for p in parameters):
                self._learn_names(module)
            parameters = [p for p in parameters if self._is_weight[p]]
            if not parameters:
                return [], []
        factors = list(torch._foreach_abs(parameters))
        if not self.elementwise:
            torch._foreach_add_(factors, group["eta"])
        return [p.grad for p in parameters if p.grad is not None], factors

    def _learn_names(self, module: nn.Module | None) -> None:
        named = [] if module is None else [(name, p) for name, p in module.named_parameters()]
        for group in self.param_groups:
            named += zip(group.get("param_names", []), group["params"], strict=False)
        self._is_weight = {parameter: "weight" in name for name, parameter in named}
        if not all(p in self._is_weight for group in self.param_groups for p in group["params"]):
            raise ValueError(
                "ASAM treats weights and biases by their names, got parameters without: give it "
                "model.named_parameters(), call step(closure, model), or set elementwise=True"
            )
