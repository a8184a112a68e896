"""The published weights of KD++ and its variants for the pairs of networks in the paper."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from lightning_kd.distillation.dkd import published_beta

__all__ = ["PublishedWeights", "published_weights"]


class PublishedWeights(NamedTuple):
    """Weights of the loss terms of ``KDPlusPlus``.

    Attributes:
        ce: weight of the cross-entropy.
        kd: weight of the base method.
        nd: weight of the norm and direction loss.
        alpha: weight of the target-class part of DKD.
        beta: weight of the non-target-class part of DKD.
    """

    ce: float
    kd: float
    nd: float
    alpha: float = 1.0
    beta: float = 8.0


# (teacher, student) of the official scripts: cross-entropy, the base and ND; with DKD: TCKD, NCKD and ND
_WEIGHTS: dict[str, dict[tuple[str, str], tuple[float, float, float]]] = {
    "kd": {
        ("resnet56", "resnet20"): (1, 1, 2),
        ("resnet32x4", "resnet8x4"): (1, 3.5, 2),
        ("wrn_40_2", "wrn_40_1"): (1, 1, 1.5),
        ("resnet50", "mobilenetv2"): (1, 3, 0.5),
        ("resnet32x4", "shufflenetv1"): (1, 2.5, 1.5),
        ("resnet32x4", "shufflenetv2"): (1, 4, 0.5),
        ("torchvision/resnet34", "torchvision/resnet18"): (1, 2.5, 1),
        ("torchvision/resnet50", "torchvision/resnet18"): (1, 4, 1),
        ("torchvision/resnet101", "torchvision/resnet18"): (1, 3.5, 4),
        ("torchvision/resnet152", "torchvision/resnet18"): (1, 4, 2),
        ("torchvision/resnet50", "mobilenetv1"): (1, 4, 1),
    },
    "dkd": {
        ("resnet56", "resnet20"): (2.5, 4, 3.5),
        ("resnet32x4", "resnet8x4"): (2, 8, 0.5),
        ("wrn_40_2", "wrn_40_1"): (1, 6, 1),
        ("resnet50", "mobilenetv2"): (0.5, 8, 1),
        ("resnet32x4", "shufflenetv1"): (0.5, 8, 4),
        ("resnet32x4", "shufflenetv2"): (0.5, 6, 0.5),
        ("torchvision/resnet34", "torchvision/resnet18"): (0.8, 0.5, 1),
        ("torchvision/resnet50", "torchvision/resnet18"): (0.6, 0.5, 2),
        ("torchvision/resnet101", "torchvision/resnet18"): (0.8, 0.5, 1),
        ("torchvision/resnet152", "torchvision/resnet18"): (1, 1, 1),
        ("torchvision/resnet50", "mobilenetv1"): (0.8, 1, 1),
    },
    "dist": {
        ("resnet56", "resnet20"): (1, 2, 1),
        ("resnet32x4", "resnet8x4"): (1, 1.5, 4),
        ("wrn_40_2", "wrn_40_1"): (1, 2.5, 3),
        ("resnet50", "mobilenetv2"): (1, 7, 1),
        ("resnet32x4", "shufflenetv1"): (1, 2.5, 3),
        ("resnet32x4", "shufflenetv2"): (1, 3, 4),
    },
    "reviewkd": {
        ("resnet56", "resnet20"): (1, 1.2, 1),
        ("resnet32x4", "resnet8x4"): (1, 8, 1),
        ("wrn_40_2", "wrn_40_1"): (1, 5, 4),
        ("resnet50", "mobilenetv2"): (1, 6, 2),
        ("resnet32x4", "shufflenetv1"): (1, 7, 1),
        ("resnet32x4", "shufflenetv2"): (1, 8, 1.5),
    },
}
# weight of the base method for pairs that are not in the paper
_USUAL = {"kd": 1.0, "dist": 2.0, "reviewkd": 5.0}


def published_weights(student: str | nn.Module, teacher: str | nn.Module, base: str = "kd") -> PublishedWeights:
    """The weights of the official scripts for a pair of networks.

    Args:
        student: name of the network; for a module the defaults are returned.
        teacher: name of the network; for a module the defaults are returned.
        base: the method that the norm and direction loss (ND) is added to: ``"kd"``, ``"dkd"``, ``"dist"`` or
            ``"reviewkd"``.

    Returns:
        The weights. For a pair that is not in the paper: 1 for cross-entropy and ND, and for the base its usual weight:
            1 for KD, 2 for DIST, 5 for ReviewKD, ``published_beta`` for DKD.

    Raises:
        ValueError: if ``base`` is unknown.
    """
    if base not in _WEIGHTS:
        raise ValueError(f"base must be one of {', '.join(_WEIGHTS)}, got {base!r}: give one of them")
    found = None
    if isinstance(student, str) and isinstance(teacher, str):
        found = _WEIGHTS[base].get((teacher, student))
    if base == "dkd":
        alpha, beta, nd = found or (1.0, published_beta(student, teacher), 1.0)
        return PublishedWeights(1.0, 1.0, float(nd), float(alpha), float(beta))
    return PublishedWeights(*(float(weight) for weight in found or (1.0, _USUAL[base], 1.0)))
