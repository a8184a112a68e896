"""Linear regression with the loss ``|residual|^p`` and a weight for each sample."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lightning_kd.active_learning.whitened_rows import cpu_tensor
from lightning_kd.argument_checks import check_numbers


def lp_regression(
    features: Tensor | np.ndarray,
    target: Tensor | np.ndarray,
    weights: Tensor | np.ndarray | None = None,
    p: float = 2.0,
) -> Tensor:
    """The ``theta`` with the smallest ``sum_i weights_i |features_i theta - target_i|^p``.

    It is found by least squares for ``p = 2``, otherwise by Newton's method on ``(r^2 + e^2)^(p/2)``, where ``e``
    decreases to 1e-10 of the largest residual. If the features do not have full rank, it is the solution with the
    smallest norm. ``theta`` is not constrained, as in the experiments of arXiv 2405.14121.

    Args:
        features: ``[n, d]``, any real dtype.
        target: ``[n]``, or ``[n, k]`` for ``k`` regressions.
        weights: ``[n]``, 0 or more: loss weights as in ``Draw``. Default: 1.
        p: exponent, 1 or more.

    Returns:
        float64 ``[d]`` or ``[d, k]``.

    Raises:
        ValueError: for shapes that do not fit, values that are not finite, negative weights, and ``p`` below 1.
    """
    check_numbers(least=1, p=p)
    rows, wanted = (cpu_tensor(value).double() for value in (features, target))
    weight = torch.ones(len(rows), dtype=torch.float64) if weights is None else cpu_tensor(weights).double()
    if (
        rows.ndim != 2
        or 0 in rows.shape
        or wanted.ndim not in (1, 2)
        or len({len(rows), len(wanted), *weight.shape}) > 1
    ):
        shapes = ", ".join(str(list(value.shape)) for value in (rows, wanted, weight))
        raise ValueError(f"features, target and weights must be [n, d], [n] or [n, k], and [n], got {shapes}")
    if not all(bool(value.isfinite().all()) for value in (rows, wanted, weight)) or bool((weight < 0).any()):
        raise ValueError("features, target and weights must be finite, and weights 0 or more: leave out such samples")
    scale = weight.pow(1 / p)[:, None]
    left, value, right = torch.linalg.svd(rows * scale, full_matrices=False)
    rank = int((value > max(rows.shape) * torch.finfo(value.dtype).eps * value.max()).sum()) if len(value) else 0
    basis, targets = left[:, :rank], (wanted if wanted.ndim == 2 else wanted[:, None]) * scale
    found = [_smallest_sum(basis, column, p) for column in targets.unbind(1)]
    theta = right[:rank].T @ (torch.stack(found, 1) / value[:rank, None])
    return theta if wanted.ndim == 2 else theta[:, 0]


def _smallest_sum(basis: Tensor, target: Tensor, p: float) -> Tensor:
    """The ``z`` ``[r]`` with the smallest ``sum |basis z - target|^p``; the columns of ``basis`` are orthonormal."""
    z = basis.T @ target
    spread = float((basis @ z - target).abs().max()) if len(target) else 0.0
    if p == 2 or spread <= 1e-14 * float(target.abs().max()) or not len(z):
        return z

    def smooth(z: Tensor, off: float) -> tuple[Tensor, Tensor]:
        residual = (basis @ z - target) / spread
        return residual, residual.square() + off**2

    for off in 10.0 ** -np.arange(1, 11):
        for _ in range(100):
            residual, square = smooth(z, off)
            slope = basis.T @ (square ** (p / 2 - 1) * residual)
            bend = square ** (p / 2 - 2) * (off**2 + (p - 1) * residual.square())
            step = torch.linalg.lstsq(bend.sqrt()[:, None] * basis, (square ** (p / 2 - 1) * residual) / bend.sqrt())[0]
            gain, value, length = float(slope @ step), float(square.pow(p / 2).sum()), 1.0
            while length > 1e-6 and smooth(z - length * spread * step, off)[1].pow(p / 2).sum() > value:
                length /= 2
            z = z - length * spread * step
            if gain <= 1e-15 * value or length <= 1e-6:
                break
    return z
