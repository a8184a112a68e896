"""NKD: normalized distillation of the non-target classes.

Zhendong Yang, Ailing Zeng, Zhe Li, Tianke Zhang, Chun Yuan, Yu Li. From Knowledge Distillation to Self-Knowledge
Distillation: A Unified Approach with Normalized Loss and Customized Soft Labels. ICCV 2023, arXiv 2303.13005.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.label_matrix import check_target_or_matrix, main_class
from lightning_kd.core.losses import at_least_float32, check_logits, check_positive
from lightning_kd.distillation.distillation_task import Distillation

__all__ = ["NKD", "nkd_loss"]


def nkd_loss(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor, temperature: float, gamma: float
) -> Tensor:
    """``-p_y log q_y - gamma T^2 sum_k p'_k log q'_k``, mean over the batch.

    ``p`` and ``q`` are the softmax of teacher and student at temperature 1, and ``y`` is the target class. ``p'`` and
    ``q'`` are the softmax over the other classes only, at temperature ``T``. This is a cross-entropy, which is not 0 if
    both networks agree. With two classes the second part is always 0.

    Args:
        student_logits: ``[B, C]``, ``C >= 2``; half precision is computed in float32, float64 stays.
        teacher_logits: ``[B, C]``; gets no gradient.
        target: int64 ``[B]``, or a label matrix ``[B, C]``, for example of mixed images; its largest entry is the
            target class.
        temperature: temperature of the other classes, above 0.
        gamma: weight of the other classes, at least 0.

    Returns:
        Scalar.

    Raises:
        ValueError: if the logits differ in shape, an argument is out of range, or the target has another shape or
            dtype, is out of range or has rows that do not sum to 1 (values are checked on a CPU only).

    Source: arXiv 2303.13005, equation 6.
    """
    check_logits(student_logits, teacher_logits)
    check_target_or_matrix(student_logits, target)
    check_positive(temperature=temperature)
    check_numbers(least=0, gamma=gamma)
    student, teacher = at_least_float32(student_logits, teacher_logits.detach())
    label = main_class(target)[:, None]
    of_target = teacher.softmax(1).gather(1, label) * student.log_softmax(1).gather(1, label)
    # the other classes are selected by index, which is exact in every dtype
    columns = torch.arange(student.shape[1] - 1, device=label.device)
    others = columns + (columns >= label)
    student, teacher = student.gather(1, others) / temperature, teacher.gather(1, others) / temperature
    of_others = (teacher.softmax(1) * student.log_softmax(1)).sum(1)
    return -of_target.mean() - gamma * temperature**2 * of_others.mean()


class NKD(Distillation):
    """NKD (Yang et al., ICCV 2023, arXiv 2303.13005): normalized knowledge distillation.

    The distillation loss is split into the target class and the other classes. The probabilities of the other classes
    are normalised to sum 1 in both networks, so that the student learns their relation to each other independently of
    the target class (see ``nkd_loss``).

    Targets may be label matrices ``[B, C]``, for example from a loader that mixes images. Cross-entropy then uses the
    whole matrix, the distillation loss its largest entry.

    Args:
        student: see ``Distillation``.
        teacher: see ``Distillation``.
        num_classes: see ``Task``.
        temperature: temperature of the other classes: 3 on CIFAR-100, 1 on ImageNet.
        gamma: weight of the other classes: 3.5 on CIFAR-100, 1.5 on ImageNet.
        ce_weight: weight of the cross-entropy.
        kd_weight: weight of ``nkd_loss``.
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
        temperature: float = 3.0,
        gamma: float = 3.5,
        ce_weight: float = 1.0,
        kd_weight: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(student, teacher, num_classes, ce_weight=ce_weight, kd_weight=kd_weight, **kwargs)
        check_numbers(above=0, temperature=temperature)
        check_numbers(least=0, gamma=gamma)
        self.temperature, self.gamma = temperature, gamma

    def training_target(self, batch: Any) -> Tensor | None:
        target = super().training_target(batch)
        return None if target is None else main_class(target)  # the loss checks a matrix itself

    def distillation_loss(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
        return nkd_loss(student_logits, teacher_logits, target, self.temperature, self.gamma)
