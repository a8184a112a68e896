"""Optimum shifting: of all weights of a layer with the same outputs on given inputs, take the smallest.

Yuyan Zhou, Ye Li, Lei Feng, Sheng-Jun Huang. Improving Generalization of Deep Neural Networks by Optimum Shifting.
AAAI 2025, arXiv 2405.14111. The paper has no published code. It solves a linear system with the Gram matrix of the
inputs; here the weight is projected onto the space that the inputs span. This is equal in exact arithmetic, and never
divides by a small number.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_kd.flatness._row_space import (
    Projector,
    check_mode,
    check_rtol,
    default_rtol,
    patches,
    project,
    projector_of_gram,
    projector_of_rows,
    wide,
)
from lightning_kd.flatness._shift_network import shift_network
from lightning_kd.flatness._shift_report import LayerShift, ShiftReport

__all__ = ["LayerShift", "Shift", "ShiftReport", "shift_conv2d", "shift_from_gram", "shift_linear", "shift_network"]


class Shift(NamedTuple):
    """The weight and bias of a layer after a shift.

    Attributes:
        weight: shifted weight, in the shape, dtype and device of the given one.
        bias: bias, likewise; ``None`` if there was none.
        rank: numerical rank of the inputs (``"joint"``: with a column of ones; ``"free"``: minus their mean); a list
            with one for each group of a grouped convolution.
        status: ``"shifted"``, or ``"identity"`` if the inputs span the whole space, so that weight and bias are exact
            copies of the given ones.
        weight_norm_before: Frobenius norm of the given weight.
        weight_norm_after: Frobenius norm of the shifted weight.
    """

    weight: Tensor
    bias: Tensor | None
    rank: int | list[int]
    status: str
    weight_norm_before: float
    weight_norm_after: float


def shift_linear(
    weight: Tensor, bias: Tensor | None, inputs: Tensor, mode: str = "fixed", rtol: float | None = None
) -> Shift:
    """The smallest weight that gives the same outputs as ``weight`` and ``bias`` on ``inputs``.

    ``W' = W P``, where ``P`` is the orthogonal projector onto the row space of the inputs ``A``. The outputs on the
    inputs do not change, up to singular values that count as 0, and so neither does a loss of these outputs.
    ``|W|^2 = |W'|^2 + |W - W'|^2``; a second shift on the same inputs changes nothing. Computed in float64 and without
    gradient.

    Modes: ``"fixed"`` keeps the bias. ``"joint"`` minimises ``|W|^2 + |b|^2`` (``A`` gets a column of ones).
    ``"free"`` minimises ``|W|^2`` alone: ``P`` is the projector for ``A - m`` with the mean row ``m``, and
    ``b' = b + (W - W') m``; with one row, or equal rows, ``W'`` is 0.

    Args:
        weight: ``[K, d]``.
        bias: ``[K]`` or ``None``.
        inputs: ``A``, ``[..., d]``, what enters the layer; the leading dimensions are ``n`` rows.
        mode: ``"fixed"``, ``"joint"`` or ``"free"``; the last two need a bias.
        rtol: singular values up to this share of the largest count as 0. Default: ``max(n, d)`` times the machine
            epsilon of the inputs' dtype for float32 and float64, but at most 1e-4; 1e-3 on CUDA with TF32; 1e-2 in half
            precision.

    Returns:
        ``Shift``.

    Raises:
        ValueError: for shapes that do not fit, inputs without rows, all 0 or not finite, and an unknown mode.

    Source: arXiv 2405.14111, ``V* = A^T (A A^T)^-1 Z`` with ``V = W^T`` and ``Z = A V``.
    """
    if weight.ndim != 2 or inputs.ndim < 1 or inputs.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"inputs must be [n, d] for a weight [K, d], got {list(inputs.shape)} and {list(weight.shape)}: give what "
            "enters the layer"
        )
    _check(weight, bias, inputs, mode, rtol)
    rows = inputs.reshape(-1, inputs.shape[-1])
    projector = _projector(rows, mode, rtol)
    return _shifted(weight, bias, [projector])


def shift_conv2d(
    weight: Tensor,
    bias: Tensor | None,
    inputs: Tensor,
    stride: int | tuple[int, ...] = 1,
    padding: int | str | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
    mode: str = "fixed",
    rtol: float | None = None,
    padding_mode: str = "zeros",
) -> Shift:
    """``shift_linear`` for a 2-D convolution: the rows are the patches that the filters see, for each group by itself.

    The weight changes only if the patches do not span the space: fewer of them than weights in a filter, or linearly
    dependent ones.

    Args:
        weight: ``[K, C / groups, kh, kw]``.
        bias: ``[K]`` or ``None``.
        inputs: ``[N, C, H, W]`` or ``[C, H, W]``, not padded.
        stride: as in ``torch.nn.Conv2d``.
        padding: as in ``torch.nn.Conv2d``; a number, a pair, ``"same"`` or ``"valid"``.
        dilation: as in ``torch.nn.Conv2d``.
        groups: as in ``torch.nn.Conv2d``.
        mode: see ``shift_linear``.
        rtol: see ``shift_linear``, with the number of patches as ``n`` and ``C / groups * kh * kw`` as ``d``.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.

    Returns:
        ``Shift``; ``rank`` is a list if ``groups`` is above 1, and ``status`` is ``"identity"`` only if no group
        changed.

    Raises:
        ValueError: see ``shift_linear``.
    """
    fits = weight.ndim == 4 and inputs.ndim in (3, 4) and groups > 0 and weight.shape[0] % groups == 0
    if not fits or inputs.shape[-3] != weight.shape[1] * groups:
        raise ValueError(
            f"inputs must be [N, C, H, W] for a weight [K, C / groups, kh, kw], got {list(inputs.shape)} and "
            f"{list(weight.shape)} with groups={groups}: give what enters the layer"
        )
    _check(weight, bias, inputs, mode, rtol)
    kernel_size = (weight.shape[2], weight.shape[3])
    rows = patches(inputs, kernel_size, stride, padding, dilation, groups, padding_mode)
    return _shifted(weight, bias, [_projector(group, mode, rtol) for group in rows])


def shift_from_gram(
    weight: Tensor,
    bias: Tensor | None,
    gram: Tensor,
    mode: str = "fixed",
    rtol: float | None = None,
    *,
    total: Tensor | None = None,
    count: int | None = None,
) -> Shift:
    """``shift_linear`` for more inputs than fit into memory, from sums over their rows ``a``.

    The eigenvalues of the Gram matrix are the squared singular values, so singular values below about 1e-7 of the
    largest are rounding errors of float64: ``rtol`` is at least 1e-7.

    Args:
        weight: ``[K, d]``, or a convolution's ``[K, ...]`` with ``d`` weights a filter and one group.
        bias: ``[K]`` or ``None``.
        gram: sum of ``a a^T``, ``[d, d]``, accumulated in float64.
        mode: see ``shift_linear``.
        rtol: singular values up to this share of the largest count as 0. Default: 1e-7; give 1e-5 to 1e-4 for inputs
            that were computed in float32, 1e-2 for half precision.
        total: sum of ``a``, ``[d]``; needed for ``"joint"`` and ``"free"``.
        count: number of rows; needed for ``"joint"`` and ``"free"``.

    Returns:
        ``Shift``.

    Raises:
        ValueError: for shapes that do not fit, a matrix that is 0, not finite or not float64, an unknown mode.
    """
    check_mode(mode, bias is not None)
    dim = weight[0].numel() if weight.ndim >= 2 and len(weight) else -1
    if gram.shape != (dim, dim) or gram.dtype != torch.float64:
        raise ValueError(
            f"gram must be float64 [d, d] for a weight [K, d], got {gram.dtype} {list(gram.shape)} and "
            f"{list(weight.shape)}: add up the outer products of the inputs in float64"
        )
    if mode != "fixed" and (total is None or count is None or total.shape != (dim,) or count < 1):
        raise ValueError(
            f"mode {mode!r} needs the sum of the inputs and their number, got total "
            f"{None if total is None else list(total.shape)} and count {count}: give total [{dim}] and count"
        )
    _check(weight, bias, gram, mode, rtol)
    _check_some(gram)
    total = None if total is None else wide(total)
    return _shifted(weight, bias, [projector_of_gram(wide(gram), total, count, mode, rtol or 0.0)])


def _projector(rows: Tensor, mode: str, rtol: float | None) -> Projector:
    _check_some(rows)
    n, dim = rows.shape
    return projector_of_rows(rows, mode, default_rtol(n, dim, rows.dtype, rows.device) if rtol is None else rtol)


def _check(weight: Tensor, bias: Tensor | None, inputs: Tensor, mode: str, rtol: float | None) -> None:
    """Raise the errors that all functions of this file share."""
    check_mode(mode, bias is not None)
    check_rtol(rtol)
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{len(weight)}], got {list(bias.shape)}: give one for each output")
    if not inputs.is_floating_point() or not weight.is_floating_point():
        raise ValueError(f"inputs and weight must be floating point, got {inputs.dtype} and {weight.dtype}")
    if not inputs.numel():
        raise ValueError(f"inputs hold no row, got {list(inputs.shape)}: give at least one")
    for name, values in (("inputs", inputs), ("weight", weight), ("bias", bias)):
        if values is not None and not values.isfinite().all():
            raise ValueError(f"{name} must be finite, got NaN or infinity: look for where the training diverged")


def _check_some(inputs: Tensor) -> None:
    if not inputs.any():
        raise ValueError("inputs are all 0 (in one group at least), so the weight would become 0: give other inputs")


@torch.no_grad()
def _shifted(weight: Tensor, bias: Tensor | None, projectors: list[Projector]) -> Shift:
    """``weight`` and ``bias`` after the projection, with one projector for each group of outputs."""
    rank = [p.rank for p in projectors] if len(projectors) > 1 else projectors[0].rank
    before = float(wide(weight).norm())
    if all(p.basis is None for p in projectors):
        return Shift(
            weight.detach().clone(), None if bias is None else bias.detach().clone(), rank, "identity", before, before
        )
    new_weight, new_bias = project(weight, bias, projectors)
    return Shift(new_weight, new_bias, rank, "shifted", before, float(wide(new_weight).norm()))
