"""The rows of a large matrix in an orthonormal basis, block by block, for Lewis weights in ``O(n + d^2)`` memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_kd.argument_checks import check_numbers

BLOCK = 4096  # rows converted to float64 at once


def cpu_tensor(values: Any) -> Tensor:
    """A tensor, an array or lists of numbers as a detached CPU tensor of the same dtype; Python floats as float64."""
    return torch.as_tensor(values if isinstance(values, Tensor) else np.asarray(values)).detach().cpu()


class WhitenedRows:
    """The nonzero rows of a matrix in an orthonormal basis of its row space, one float64 block at a time.

    Args:
        features: ``[n, d]``, any real dtype.
        rank_tolerance: see ``lewis_weights``.

    Attributes:
        count: ``n``.
        kept: int64, positions of the rows that are not 0.
        rank: numerical rank of the matrix.

    Raises:
        ValueError: for wrong shapes, complex numbers, values that are not finite, or a tolerance out of (0, 1).
    """

    def __init__(self, features: Tensor | np.ndarray, rank_tolerance: float | None) -> None:
        self.features = features = cpu_tensor(features)
        if features.ndim != 2 or 0 in features.shape or features.is_complex():
            raise ValueError(
                f"features must be [n, d] real numbers, got {list(features.shape)}: give one row for each sample"
            )
        check_numbers(above=0, below=1, optional=True, rank_tolerance=rank_tolerance)
        self.count, width = features.shape
        self.size = max(BLOCK, width)
        largest, nonzero = torch.zeros(width, dtype=torch.float64), [torch.zeros(0, dtype=torch.bool)]
        for block in features.split(self.size):
            block = block.double().abs()
            if not bool(block.isfinite().all()):
                raise ValueError("features must be finite, got NaN or infinite values: look at the network's training")
            largest = torch.maximum(largest, block.amax(0))
            nonzero.append(block.amax(1) > 0)
        self.kept = torch.cat(nonzero).nonzero()[:, 0]
        self.scale = largest.where(largest > 0, 1.0)
        self.change: Tensor | None = None
        upper = torch.zeros(0, width, dtype=torch.float64)
        for _, block in self.blocks():
            upper = torch.linalg.qr(torch.cat([upper, block]), mode="r")[1]
        _, value, basis = torch.linalg.svd(upper, full_matrices=False)
        if rank_tolerance is None:
            wide = not features.is_floating_point() or features.dtype == torch.float64
            rank_tolerance = max(features.shape) * torch.finfo(torch.float64).eps
            rank_tolerance = rank_tolerance if wide else max(rank_tolerance, 16 * torch.finfo(features.dtype).eps)
        self.rank = int((value > rank_tolerance * value.max()).sum()) if len(value) else 0
        self.change = basis[: self.rank].T / value[: self.rank]

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Slices of ``kept`` and their rows in the basis, float64 ``[block, rank]``."""
        for start in range(0, len(self.kept), self.size):
            part = slice(start, start + self.size)
            block = self.features[self.kept[part]].double() / self.scale
            yield part, block if self.change is None else block @ self.change

    def gram(self, log_scale: Tensor) -> Tensor:
        """The Gram matrix ``[rank, rank]`` of the rows, each multiplied by ``exp(log_scale)``.

        It is computed from the rows, so rounding errors that make the basis not quite orthonormal cancel later.
        """
        gram = torch.zeros(self.rank, self.rank, dtype=torch.float64)
        for part, block in self.blocks():
            block *= log_scale[part].exp()[:, None]
            gram.addmm_(block.T, block)
        return gram
