"""What MixMatch does with guessed labels in DivideMix: sharpening, the penalty on the mean guess, the ramp."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_kd.core.losses import at_least_float32, check_positive, check_shapes

__all__ = ["linear_ramp", "prior_penalty", "sharpen"]


def sharpen(probabilities: Tensor, temperature: float) -> Tensor:
    """``p^(1 / temperature)``, normalised again over classes.

    Args:
        probabilities: ``[B, C]``, non-negative.
        temperature: positive; below 1 it sharpens.

    Returns:
        ``[B, C]``.

    Source: arXiv 2002.07394, equation 7.
    """
    check_positive(temperature=temperature)
    check_shapes(probabilities=(probabilities, "BC"))
    powered = (probabilities / probabilities.amax(1, keepdim=True)) ** (1 / temperature)
    return powered / powered.sum(1, keepdim=True)


def prior_penalty(probabilities: Tensor) -> Tensor:
    """``sum_c (1/C) log((1/C) / mean_i p_ic)``: how far the batch's mean prediction is from uniform, a scalar >= 0.

    Args:
        probabilities: ``[B, C]``; half precision is computed in float32.

    Source: arXiv 2002.07394, equation 11.
    """
    check_shapes(probabilities=(probabilities, "BC"))
    (probabilities,) = at_least_float32(probabilities)
    classes = probabilities.shape[1]
    mean = probabilities.mean(0).clamp_min(torch.finfo(probabilities.dtype).tiny)
    return -(mean * classes).log().mean()


def linear_ramp(epoch: float, start: float, length: float) -> float:
    """0 up to ``start``, then linear to 1 at ``start + length``; ``epoch`` may be fractional."""
    return min(max((epoch - start) / length, 0.0), 1.0) if length > 0 else float(epoch >= start)
