"""Knowledge distillation: the student learns the teacher's class probabilities.

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
        temperature: above 0.

    Returns:
        Scalar.

    Raises:
        ValueError: if the logits differ in shape, or ``temperature`` is not above 0.

    Source: arXiv 1503.02531, section 2.
    """
    check_logits(student_logits, teacher_logits)
    check_positive(temperature=temperature)
    student_logits, teacher_logits = at_least_float32(student_logits, teacher_logits.detach())
    log_student = (student_logits / temperature).log_softmax(1)
    log_teacher = (teacher_logits / temperature).log_softmax(1)
    teacher = log_teacher.exp()
    # a class to which the teacher gives probability 0 counts 0, even if both logarithms overflow
    difference = (log_teacher - log_student).masked_fill(teacher == 0, 0)
    return temperature**2 * (teacher * difference).sum(1).mean()


class KD(Distillation):
    """Knowledge distillation (Hinton et al., 2015, arXiv 1503.02531): learn the teacher's class probabilities.

    Besides the label the student learns the probabilities of a trained teacher, which tell how similar the classes are.
    A temperature above 1 makes both distributions softer, so that improbable classes count more (see ``kd_loss``).

    Args:
        student: see ``Distillation``.
        teacher: see ``Distillation``.
        num_classes: see ``Task``.
        temperature: temperature of both softmax outputs, above 0; 4 on CIFAR, 1 on ImageNet.
        ce_weight: weight of the cross-entropy. The defaults 0.1 and 0.9 are those of the usual benchmark on CIFAR; on
            ImageNet it has 0.5 and 0.5.
        kd_weight: weight of ``kd_loss``.
        standardize: standardize the logits of both networks first (see ``lskd.standardize``), so that only order and
            relative distances are learnt; use it with weights about ten times larger (9 for ``kd_weight``) and
            temperature 2.
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
