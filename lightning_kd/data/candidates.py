"""Labels of which some are false: the candidates of partial labels."""

from __future__ import annotations

import numpy as np

from lightning_kd.argument_checks import check_numbers

__all__ = ["candidates_from_uniforms"]


def candidates_from_uniforms(target: np.ndarray, rate: float, uniforms: np.ndarray) -> np.ndarray:
    """The true labels and, with probability ``rate`` each, others beside them.

    Args:
        target: ``[N, C]`` of 1 and 0; one-hot rows for one class an image.
        rate: the share of the others that becomes a candidate, in [0, 1).
        uniforms: ``[N, C]`` in [0, 1), drawn at once, so that the result depends on the shape and the seed alone.

    Returns:
        uint8 ``[N, C]``: 1 where ``target`` is, and where ``uniforms < rate``.

    Raises:
        ValueError: for shapes that differ, other values, and a rate out of range.
    """
    check_numbers(least=0, below=1, rate=rate)
    target, uniforms = np.asarray(target), np.asarray(uniforms)
    if target.ndim != 2 or target.shape != uniforms.shape:
        raise ValueError(
            f"target {target.shape} and uniforms {uniforms.shape} must both be [N, C]: draw one number for each label"
        )
    if not np.isin(target, (0, 1)).all():
        raise ValueError(f"target must hold 0 and 1, got {target.min()} to {target.max()}: correct the labels")
    return ((target == 1) | (uniforms < rate)).astype(np.uint8)
