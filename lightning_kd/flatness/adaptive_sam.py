"""Adaptive sharpness-aware minimisation (ASAM): SAM with an uphill step that scales with each weight.

Jungmin Kwon, Jeongseop Kim, Hyunseo Park, In Kwon Choi. ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant
Learning of Deep Neural Networks. ICML 2021, arXiv 2102.11600.
"""

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

    SAM with an uphill step in proportion to the weights: large weights move further than small ones. Multiplying one
    layer by a factor and dividing the next one by it, which does not change the outputs, then matters less than in SAM.

    The second gradient is taken at ``w + rho T^2 g / (|T g| + 1e-16)``. By default ``T`` is ``|w| + eta`` for every
    parameter whose name contains "weight" (also scales of normalisation layers) and 1 for the others, as in the
    authors' code. The names come from the LightningModule; in a plain loop give ``model.named_parameters()``
    (torch 2.6), or give the model to ``step``.

    Args:
        params: see ``SAM``.
        base_optimizer: see ``SAM``.
        rho: length of the uphill step, at least 0. 0.5 suits CIFAR-10, 1.0 CIFAR-100; 2.0 with ``elementwise``.
        eta: added to ``|w|``, at least 0. With 0, weights that are exactly 0 are not moved uphill.
        average_first_pass: see ``SAM``.
        elementwise: use ``T = |w|`` for every parameter, biases too, without ``eta``. Unlike the default it is exactly
            invariant to the rescaling of layers with biases.

    Raises:
        ValueError: see ``SAM``; also if parameter names are needed and not known.
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
                "ASAM tells weights from biases by their names, got parameters without names: give it "
                "model.named_parameters(), call step(closure, model), or set elementwise=True"
            )
