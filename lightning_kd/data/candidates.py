"""Draws candidate labels, of which some are false, for partial-label learning."""

from __future__ import annotations

import numpy as np

from lightning_kd.argument_checks import check_numbers

__all__ = ["candidates_from_uniforms"]


def candidates_from_uniforms(target: np.ndarray, rate: float, uniforms: np.ndarray) -> np.ndarray:
    """The true labels, and each other label with probability ``rate``.

    Args:
        target: ``[N, C]`` of 1 and 0; one-hot rows where each image has one class.
        rate: probability in [0, 1) that a false label becomes a candidate.
        uniforms: ``[N, C]``, uniform random numbers in [0, 1).

    Returns:
        uint8 ``[N, C]``: 1 where ``target`` is 1 or ``uniforms < rate``.

    Raises:
        ValueError: for shapes that differ, another value in ``target``, or a rate out of range.
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
