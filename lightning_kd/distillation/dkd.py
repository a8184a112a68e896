"""Decoupled knowledge distillation: separate weights for the target class and for the other classes.

Borui Zhao, Quan Cui, Renjie Song, Yiyu Qiu, Jiajun Liang. Decoupled Knowledge Distillation. CVPR 2022, arXiv
2203.08679.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.losses import at_least_float32, check_logits, check_positive, check_target
from lightning_kd.distillation.distillation_task import Distillation
from lightning_kd.distillation.kd import kd_loss
from lightning_kd.distillation.lskd import standardize

__all__ = ["DKD", "dkd_loss", "published_beta"]

# (teacher, student) of the paper's tables and the official configurations
_BETA = {
    ("resnet56", "resnet20"): 2.0,
    ("resnet110", "resnet32"): 2.0,
    ("resnet32x4", "resnet8x4"): 8.0,
    ("resnet32x4", "shufflenetv1"): 8.0,
    ("resnet32x4", "shufflenetv2"): 8.0,
    ("wrn_40_2", "wrn_16_2"): 6.0,
    ("wrn_40_2", "wrn_40_1"): 6.0,
    ("wrn_40_2", "shufflenetv1"): 8.0,
    ("vgg13", "vgg8"): 6.0,
    ("vgg13", "mobilenetv2"): 6.0,
    ("resnet50", "mobilenetv2"): 8.0,
    ("torchvision/resnet34", "torchvision/resnet18"): 0.5,
}


def published_beta(student: str | nn.Module, teacher: str | nn.Module) -> float:
    """The paper's ``beta`` for a pair of networks: 2, 6 or 8 on CIFAR-100, 0.5 for resnet34 to resnet18 on ImageNet.

    Args:
        student: name of the network; for a module the default is returned.
        teacher: name of the network; for a module the default is returned.

    Returns:
        ``beta``; 8 for a pair that is not in the paper.
    """
    if isinstance(student, str) and isinstance(teacher, str):
        return _BETA.get((teacher, student), 8.0)
    return 8.0


def dkd_loss(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor, alpha: float, beta: float, temperature: float
) -> Tensor:
    """``alpha * TCKD + beta * NCKD``: distillation of the target class and of the other classes.

    With ``p`` the softmax at ``temperature``, TCKD is ``temperature^2`` times the KL divergence between the binary
    distributions ``(p_target, 1 - p_target)`` of teacher and student. NCKD is the same for the distributions over the
    other classes. The plain KD loss equals ``TCKD + (1 - p_teacher_target) * NCKD`` for each sample.

    Args:
        student_logits: ``[B, C]``, ``C >= 2``; half precision is computed in float32, float64 stays.
        teacher_logits: ``[B, C]``; gets no gradient.
        target: int64 ``[B]``.
        alpha: weight of TCKD.
        beta: weight of NCKD.
        temperature: above 0.

    Returns:
        Scalar, mean over the batch.

    Raises:
        ValueError: if the logits differ in shape, ``temperature`` is not above 0, or the target has another shape or
            dtype or is out of range (checked on a CPU only).

    Source: arXiv 2203.08679, equation 7.
    """
    check_logits(student_logits, teacher_logits)
    check_target(student_logits, target)
    check_positive(temperature=temperature)
    student_logits, teacher_logits = at_least_float32(student_logits, teacher_logits.detach())
    # the other classes are selected by index: exact in every dtype, unlike masking with a large negative value
    columns = torch.arange(student_logits.shape[1] - 1, device=target.device)
    others = columns + (columns >= target[:, None])
    target_part, other_parts = [], []
    for logits in (student_logits, teacher_logits):
        rest = logits.gather(1, others)
        pair = torch.cat([logits.gather(1, target[:, None]), temperature * (rest / temperature).logsumexp(1, True)], 1)
        target_part.append(pair)
        other_parts.append(rest)
    tckd = kd_loss(target_part[0], target_part[1], temperature)
    nckd = kd_loss(other_parts[0], other_parts[1], temperature)
    return alpha * tckd + beta * nckd


class DKD(Distillation):
    """Decoupled knowledge distillation (Zhao et al., CVPR 2022, arXiv 2203.08679).

    The plain distillation loss is the sum of two parts: how probable the target class is, and how the rest is divided
    among the other classes. The second part has a small weight if the teacher is sure of the target. DKD gives both
    parts their own, constant weights (see ``dkd_loss``).

    Args:
        student: see ``Distillation``.
        teacher: see ``Distillation``.
        num_classes: see ``Task``.
        alpha: weight of the target-class part.
        beta: weight of the non-target-class part. Default: that of the paper for the pair of names, see
            ``published_beta``, and 8 for other networks.
        temperature: temperature of both softmax outputs: 4 on CIFAR, 1 on ImageNet.
        warmup_epochs: the distillation loss is multiplied by ``min(epoch / warmup_epochs, 1)``, epochs counted from 1.
        ce_weight: weight of the cross-entropy.
        kd_weight: weight of ``dkd_loss``.
        standardize: standardize the logits of both networks first (see ``lskd.standardize``); use it with ``alpha`` and
            ``beta`` about ten times larger and temperature 2.
        kwargs: the further arguments of ``Distillation`` and ``Task``.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        student: str | nn.Module,
        teacher: str | nn.Module,
        num_classes: int,
        *,
        alpha: float = 1.0,
        beta: float | None = None,
        temperature: float = 4.0,
        warmup_epochs: int = 20,
        ce_weight: float = 1.0,
        kd_weight: float = 1.0,
        standardize: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(student, teacher, num_classes, ce_weight=ce_weight, kd_weight=kd_weight, **kwargs)
        check_numbers(above=0, temperature=temperature)
        check_numbers(least=0, alpha=alpha)
        check_numbers(least=0, optional=True, beta=beta)
        check_numbers(least=0, whole=True, warmup_epochs=warmup_epochs)
        self.beta = published_beta(student, teacher) if beta is None else beta
        self.alpha, self.temperature, self.warmup_epochs = alpha, temperature, warmup_epochs
        self.standardize = standardize

    def distillation_loss(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
        if self.standardize:
            student_logits, teacher_logits = standardize(student_logits), standardize(teacher_logits)
        warmup = min((self.current_epoch + 1) / max(self.warmup_epochs, 1), 1.0)
        return warmup * dkd_loss(student_logits, teacher_logits, target, self.alpha, self.beta, self.temperature)
