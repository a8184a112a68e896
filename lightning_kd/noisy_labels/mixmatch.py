"""Parts of MixMatch that DivideMix uses: sharpening, the penalty on the mean prediction, and the ramp."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_kd.core.losses import at_least_float32, check_positive, check_shapes

__all__ = ["linear_ramp", "prior_penalty", "sharpen"]


def sharpen(probabilities: Tensor, temperature: float) -> Tensor:
    """Sharpen probabilities: ``p^(1 / temperature)``, normalised over the classes.

    Args:
        probabilities: ``[B, C]``, non-negative; half precision is converted to float32.
        temperature: above 0; below 1 the distribution becomes sharper.

    Returns:
        ``[B, C]``, sum 1 over the classes.

    Raises:
        ValueError: if the shape is wrong, or ``temperature`` is not above 0.

    Source: arXiv 2002.07394, equation 7.
    """
    check_positive(temperature=temperature)
    check_shapes(probabilities=(probabilities, "BC"))
    (probabilities,) = at_least_float32(probabilities)
    powered = (probabilities / probabilities.amax(1, keepdim=True)) ** (1 / temperature)
    return powered / powered.sum(1, keepdim=True)


def prior_penalty(probabilities: Tensor) -> Tensor:
    """KL divergence from the uniform distribution to the batch's mean prediction, a scalar of at least 0.

    ``sum_c (1/C) log((1/C) / mean_i p_ic)``.

    Args:
        probabilities: ``[B, C]``; half precision is computed in float32.

    Raises:
        ValueError: if the shape is wrong.

    Source: arXiv 2002.07394, equation 11.
    """
    check_shapes(probabilities=(probabilities, "BC"))
    (probabilities,) = at_least_float32(probabilities)
    classes = probabilities.shape[1]
    mean = probabilities.mean(0).clamp_min(torch.finfo(probabilities.dtype).tiny)
    return -(mean * classes).log().mean()


def linear_ramp(epoch: float, start: float, length: float) -> float:
    """0 until ``start``, then linear to 1 at ``start + length``; ``epoch`` may be fractional."""
    return min(max((epoch - start) / length, 0.0), 1.0) if length > 0 else float(epoch >= start)
