"""PAT: a label must be supported by one part of the image, too.

Ming-Kun Xie, Jia-Hao Xiao, Pei Peng, Gang Niu, Masashi Sugiyama, Sheng-Jun Huang. Counterfactual Reasoning for
Multi-Label Image Classification via Patching-Based Training. ICML 2024, arXiv 2404.06287.
"""

from __future__ import annotations

from torch import Tensor

from lightning_kd.core.losses import at_least_float32, check_positive, check_shapes

__all__ = ["aggregate_patches", "patch_weights"]


def patch_weights(attention: Tensor, temperature: float = 1.0) -> Tensor:
    """How much each patch has to say about each class: a softmax over the patches, ``[G, B, C]``.

    The largest one is the pivot patch of the class.

    Args:
        attention: logits ``[G, B, C]`` of ``G`` patches; half precision is computed in float32, float64 stays.
        temperature: above 0; the official code has 1.

    Raises:
        ValueError: for another shape, and a temperature out of range.
    """
    check_shapes(attention=(attention, "GBC"))
    check_positive(temperature=temperature)
    (attention,) = at_least_float32(attention)
    return (attention / temperature).softmax(0)


def aggregate_patches(attention: Tensor, value: Tensor, temperature: float = 1.0) -> Tensor:
    """What the patches say together: ``sum_g patch_weights(attention)_g * value_g``, logits ``[B, C]``.

    Both get gradient.

    Args:
        attention: logits ``[G, B, C]``.
        value: logits ``[G, B, C]``; the same tensor where one head gives both.
        temperature: see ``patch_weights``.

    Raises:
        ValueError: for shapes that differ, and a temperature out of range.

    Source: arXiv 2404.06287, patch prediction, as in the official code.
    """
    check_shapes(attention=(attention, "GBC"), value=(value, "GBC"))
    attention, value = at_least_float32(attention, value)
    return (patch_weights(attention, temperature) * value).sum(0)
