"""Knowledge distillation on softened class probabilities.

Geoffrey Hinton, Oriol Vinyals, Jeff Dean. Distilling the Knowledge in a Neural Network. NeurIPS Deep Learning Workshop
2014, arXiv 1503.02531.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.losses import at_least_float32, check_logits, check_positive
from lightning_kd.distillation.distillation_task import Distillation
from lightning_kd.distillation.lskd import standardize

__all__ = ["KD", "kd_loss"]


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """``temperature^2 * KL(softmax(teacher / temperature) || softmax(student / temperature))``.

    Sum over classes, mean over the batch. Gradient: ``temperature * (p_student - p_teacher) / B``.

    Args:
        student_logits: ``[B, C]``; half precision is computed in float32, float64 stays.
        teacher_logits: ``[B, C]``; gets no gradient.
        temperature: positive.

    Returns:
        Scalar.

    Raises:
        ValueError: for logits of two shapes, and a temperature that is not above 0.

    Source: arXiv 1503.02531, section 2.
    """
    check_logits(student_logits, teacher_logits)
    check_positive(temperature=temperature)
    student_logits, teacher_logits = at_least_float32(student_logits, teacher_logits.detach())
    log_student = (student_logits / temperature).log_softmax(1)
    log_teacher = (teacher_logits / temperature).log_softmax(1)
    teacher = log_teacher.exp()
    # a class that the teacher rules out counts 0, even where both logarithms overflow
    difference = (log_teacher - log_student).masked_fill(teacher == 0, 0)
    return temperature**2 * (teacher * difference).sum(1).mean()


class KD(Distillation):
    """Knowledge distillation (Hinton et al., 2015, arXiv 1503.02531).

    Args:
        student: see ``Distillation``.
        teacher: see ``Distillation``.
        num_classes: see ``Task``.
        temperature: softens both distributions (1 on ImageNet).
        ce_weight: weight of the cross-entropy. 0.1 and 0.9 are the CIFAR weights of the usual benchmark; on ImageNet
            it has 0.5 and 0.5.
        kd_weight: weight of ``kd_loss``.
        standardize: standardize the logits of both networks first (LSKD), so that only their order and spacing is
            learnt; with weights about ten times larger (9 for ``kd_weight``) and temperature 2.
        kwargs: the further arguments of ``Distillation`` and ``Task``.
    """

    def __init__(
        self,
        student: str | nn.Module,
        teacher: str | nn.Module,
        num_classes: int,
        *,
        temperature: float = 4.0,
        ce_weight: float = 0.1,
        kd_weight: float = 0.9,
        standardize: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(student, teacher, num_classes, ce_weight=ce_weight, kd_weight=kd_weight, **kwargs)
        check_numbers(above=0, temperature=temperature)
        self.temperature, self.standardize = temperature, standardize

    def distillation_loss(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
        if self.standardize:
            student_logits, teacher_logits = standardize(student_logits), standardize(teacher_logits)
        return kd_loss(student_logits, teacher_logits, self.temperature)
