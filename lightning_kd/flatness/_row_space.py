"""The space spanned by the inputs of a layer, and the projection of its weights onto it, in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_kd.argument_checks import check_numbers

MODES = ("fixed", "joint", "free")
# eigenvalues of the Gram matrix are squared singular values: in float64 those below 1e-8 of the largest are rounding
_GRAM_RTOL = 1e-7


def check_mode(mode: str, has_bias: bool, where: str = "") -> None:
    """Raise ``ValueError`` for an unknown mode, or one that changes the bias of a layer without one."""
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if mode != "fixed" and not has_bias:
        raise ValueError(f"mode {mode!r} changes the bias, and {where or 'there'} is none: take mode='fixed'")


def check_rtol(rtol: float | None) -> None:
    """Raise ``ValueError`` unless ``rtol`` is ``None`` or in [0, 1)."""
    check_numbers(least=0, below=1, optional=True, remedy="leave it out for the default", rtol=rtol)


def default_rtol(rows: int, dim: int, dtype: torch.dtype, device: torch.device) -> float:
    """The default of ``rtol``, from the precision in which the inputs were computed, see ``shift_linear``."""
    if dtype in (torch.float16, torch.bfloat16):
        return 1e-2
    if dtype == torch.float32 and device.type == "cuda" and torch.get_float32_matmul_precision() != "highest":
        return 1e-3  # TF32 has 10 bits of mantissa
    # at most 1e-4: with many float32 rows a larger tolerance would drop real directions
    return min(max(rows, dim) * torch.finfo(dtype).eps, 1e-4)


def wide(values: Tensor) -> Tensor:
    """``values`` in float64, detached, on the same device (from MPS, which has no float64, on the CPU)."""
    values = values.detach()
    return (values.cpu() if values.device.type == "mps" else values).double()


@dataclass
class Projector:
    """A shift as a linear map of a weight and its bias; it is applied to their momentum too.

    Attributes:
        basis: float64 ``[d, r]``, orthonormal columns that span the inputs; ``None`` if these span the whole space, so
            that nothing changes. With ``"joint"`` ``[d + 1, r]``, for the inputs with a column of ones.
        rank: ``r``.
        mode: ``"fixed"``, ``"joint"`` or ``"free"``.
        mean: float64 ``[d]``, mean of the inputs, for ``"free"``.
    """

    basis: Tensor | None
    rank: int
    mode: str = "fixed"
    mean: Tensor | None = None

    def apply(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """``weight`` ``[K, d]`` and ``bias`` ``[K]`` after the map, float64; with ``"fixed"`` the bias unchanged."""
        if self.basis is None:
            return weight, bias
        if self.mode == "fixed" or bias is None:
            return weight @ self.basis @ self.basis.T, bias
        if self.mode == "joint":
            joint = torch.cat([weight, bias[:, None]], 1) @ self.basis @ self.basis.T
            return joint[:, :-1], joint[:, -1]
        assert self.mean is not None
        shifted = weight @ self.basis @ self.basis.T
        return shifted, bias + (weight - shifted) @ self.mean


@torch.no_grad()
def project(weight: Tensor, bias: Tensor | None, projectors: list[Projector]) -> tuple[Tensor, Tensor | None]:
    """A weight and bias, or their momentum, after the map of one projector for each group of outputs."""
    new_weight, new_bias = weight.detach().clone(), None if bias is None else bias.detach().clone()
    share = len(weight) // len(projectors)
    for group, projector in enumerate(projectors):
        if projector.basis is not None:  # groups that do not change are exact copies
            part = slice(group * share, (group + 1) * share)
            old_bias = None if bias is None else wide(bias[part])
            moved, moved_bias = projector.apply(wide(weight[part].flatten(1)), old_bias)
            new_weight[part] = moved.view_as(weight[part]).to(weight)
            if new_bias is not None and moved_bias is not None and projector.mode != "fixed":
                new_bias[part] = moved_bias.to(new_bias)
    return new_weight, new_bias


def projector_of_rows(rows: Tensor, mode: str, rtol: float) -> Projector:
    """The projector for inputs ``[n, d]``.

    A QR decomposition is several times faster than an SVD, and its triangle gives bounds of all singular values. If
    these prove full rank, no SVD is needed; else that of the triangle, which has the inputs' singular values, is taken.
    """
    rows = wide(rows)
    scale = float(rows.norm())
    mean = rows.mean(0) if mode == "free" else None
    if mode == "joint":
        rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
    elif mean is not None:
        rows = rows - mean
    n, dim = rows.shape
    # subtracting the mean of equal rows leaves rounding errors, which must not count as a direction
    floor = max(n, dim) * torch.finfo(torch.float64).eps * scale if mode == "free" else 0.0
    tall = n > dim
    q, triangle = torch.linalg.qr(rows if tall else rows.T, mode="r" if tall else "reduced")
    if _surely_full(triangle, rtol, floor):
        return Projector(None if n >= dim else q, min(n, dim), mode, mean)
    if not tall:  # rows = triangle.T @ q.T
        left, sigma, _ = torch.linalg.svd(triangle)
        rank = _rank(sigma, rtol, floor)
        return Projector(None if rank == dim else q @ left[:, :rank], rank, mode, mean)
    _, sigma, right = torch.linalg.svd(triangle)
    rank = _rank(sigma, rtol, floor)
    return Projector(None if rank == dim else right[:rank].T, rank, mode, mean)


def projector_of_gram(gram: Tensor, total: Tensor | None, count: int | None, mode: str, rtol: float) -> Projector:
    """The projector from the sum of the inputs' outer products ``[d, d]``, their sum ``[d]`` and their number."""
    mean, scale = None, math.sqrt(max(float(torch.linalg.eigvalsh(gram)[-1]), 0.0)) if mode == "free" else 0.0
    if mode != "fixed":
        assert total is not None
        assert count is not None
        if mode == "joint":
            corner = gram.new_tensor([[float(count)]])
            gram = torch.cat([torch.cat([gram, total[:, None]], 1), torch.cat([total[None], corner], 1)])
        else:
            mean = total / count
            gram = gram - count * torch.outer(mean, mean)
    values, vectors = torch.linalg.eigh(gram)
    sigma = values.clamp(min=0).sqrt()
    rank = _rank(sigma, max(rtol, _GRAM_RTOL), _GRAM_RTOL * scale)
    basis = vectors[:, len(vectors) - rank :]  # eigenvalues ascend
    return Projector(None if rank == len(gram) else basis, rank, mode, mean)


def _rank(sigma: Tensor, rtol: float, floor: float) -> int:
    return int((sigma > max(rtol * float(sigma.max()), floor)).sum())


def _surely_full(triangle: Tensor, rtol: float, floor: float) -> bool:
    """Whether bounds of the singular values prove full rank.

    They do if a lower bound of the smallest singular value is above the threshold for an upper bound of the largest.
    The bounds are Frobenius norms of the triangle and its inverse; if these do not suffice, the closer Schatten-4
    norms, which cost two matrix products.
    """
    if not triangle.diagonal().all():
        return False
    eye = torch.eye(len(triangle), dtype=triangle.dtype, device=triangle.device)
    inverse = torch.linalg.solve_triangular(triangle, eye, upper=True)
    if 1 / float(inverse.norm()) > max(rtol * float(triangle.norm()), floor):  # False for NaN
        return True
    below, above = ((m.T @ m).norm().sqrt() for m in (inverse, triangle))
    return 1 / float(below) > max(rtol * float(above), floor)


def patches(
    inputs: Tensor,
    kernel_size: tuple[int, int],
    stride: int | tuple[int, ...],
    padding: int | str | tuple[int, ...],
    dilation: int | tuple[int, ...],
    groups: int,
    padding_mode: str,
) -> Tensor:
    """The patches that a 2-D convolution multiplies with its filters, ``[groups, N * L, D]`` from ``[N, C, H, W]``.

    ``L`` is the number of output positions and ``D = C / groups * kh * kw``, in the order of ``weight.flatten(1)``. The
    dtype is that of ``inputs``.
    """
    if inputs.ndim == 3:
        inputs = inputs[None]
    stride, dilation = _pair(stride), _pair(dilation)
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise ValueError(f"padding must be a number, a pair, 'same' or 'valid', got {padding!r}")
        spare = [
            step * (size - 1) if padding == "same" else 0 for step, size in zip(dilation, kernel_size, strict=True)
        ]
        (top, bottom), (left, right) = ((whole // 2, whole - whole // 2) for whole in spare)
    else:
        top, left = _pair(padding)
        bottom, right = top, left
    if any((top, bottom, left, right)):
        mode = "constant" if padding_mode == "zeros" else padding_mode
        inputs = F.pad(inputs, (left, right, top, bottom), mode=mode)
    columns = F.unfold(inputs, kernel_size, dilation=dilation, stride=stride)
    return columns.unflatten(1, (groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    values = tuple(value)
    return values[0], values[-1]
