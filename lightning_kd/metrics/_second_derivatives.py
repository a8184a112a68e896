"""Convolutions and batch normalisation whose second derivatives take no more than the first ones do.

Both are linear in their input, and linear in their weight. So their second derivatives are the same operations of other
tensors, and the kernels of the first ones do. PyTorch's own take about twice as long: the weight's part is a
convolution with a kernel as large as the image there, and normalisation is put together of some ten passes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


class _Layer(NamedTuple):
    """An operation that is linear in its input and in its weight.

    ``forward(x, weight, bias)`` gives the output, ``backward(grad, x, weight, mask)`` the gradients in the three.
    """

    forward: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor, list[bool]], Gradients]


class _Output(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layer: _Layer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x, weight)
        return layer.forward(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, *_InputGradients.apply(ctx.layer, list(ctx.needs_input_grad[1:]), *grads, *ctx.saved_tensors)


class _InputGradients(torch.autograd.Function):
    """The gradients of ``_Output``, to be differentiated in turn."""

    @staticmethod
    def forward(ctx: Any, layer: _Layer, mask: list[bool], grad: Tensor, x: Tensor, weight: Tensor) -> Gradients:
        ctx.layer = layer
        ctx.save_for_backward(grad, x, weight)
        ctx.set_materialize_grads(False)
        return layer.backward(grad, x, weight, mask)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        grad, x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = grads
        wanted = ctx.needs_input_grad[2:]
        output = None
        if wanted[0]:
            parts = [] if of_x is None else [ctx.layer.forward(of_x, weight, None)]
            parts += [] if of_weight is None else [ctx.layer.forward(x, of_weight, None)]
            parts += [] if of_bias is None else [of_bias.view(-1, *[1] * (grad.ndim - 2)).expand_as(grad)]
            output = sum(parts[1:], parts[0]) if parts else None
        # the gradient in the input needs that of the weight's, and the other way round
        mask = [wanted[1] and of_weight is not None, wanted[2] and of_x is not None, False]
        others: Any = (None, None, None)
        if any(mask):
            others = ctx.layer.backward(
                grad, x if of_x is None else of_x, weight if of_weight is None else of_weight, mask
            )
        return None, None, output, *(value if want else None for value, want in zip(others[:2], mask, strict=False))


class FastSecondDerivatives(TorchFunctionMode):
    """While it is on, what layers compute has second derivatives as described above; numbers differ by rounding.

    For ``nn.Conv1d`` to ``nn.Conv3d``, and for batch normalisation by running statistics; all else is as it was.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.conv1d, torch.conv2d, torch.conv3d) and len(args) == 7 and not kwargs:
            x, weight, bias, stride, padding, dilation, groups = args
            if x.ndim == weight.ndim and not isinstance(padding, str):
                layer = _convolution(stride, padding, dilation, groups, bias is not None, x.ndim)
                return _Output.apply(layer, x, weight, bias)
        if func is F.batch_norm:
            return _batch_norm(*args, **kwargs)
        return func(*args, **kwargs)


def _convolution(stride: Any, padding: Any, dilation: Any, groups: int, biased: bool, ndim: int) -> _Layer:
    settings = (list(stride), list(padding), list(dilation), False, [0] * (ndim - 2), groups)

    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.convolution(x, weight, bias, *settings)

    def backward(grad: Tensor, x: Tensor, weight: Tensor, mask: list[bool]) -> Gradients:
        size = [len(weight)] if biased else None
        found: Gradients = torch.ops.aten.convolution_backward(grad, x, weight, size, *settings, mask)
        return found

    return _Layer(forward, backward)


def _batch_norm(
    x: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if training or mean is None or variance is None or weight is None or bias is None:
        return F.batch_norm(x, mean, variance, weight, bias, training, momentum, eps)
    # the mean goes into the bias, or it would not be linear in x
    zero, scale = torch.zeros_like(mean), (variance + eps).rsqrt()

    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.native_batch_norm(x, weight, bias, zero, variance, False, momentum, eps)[0]

    def backward(grad: Tensor, x: Tensor, weight: Tensor, mask: list[bool]) -> Gradients:
        found: Gradients = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, zero, variance, None, None, False, eps, mask
        )
        return found

    return _Output.apply(_Layer(forward, backward), x, weight, bias - weight * mean * scale)
