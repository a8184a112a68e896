"""DIST: the student learns the teacher's relations between classes and samples, measured by correlation.

Tao Huang, Shan You, Fei Wang, Chen Qian, Chang Xu. Knowledge Distillation from A Stronger Teacher. NeurIPS 2022, arXiv
2205.10536.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.losses import at_least_float32, check_logits, check_positive
from lightning_kd.distillation.distillation_task import Distillation

__all__ = ["DIST", "dist_loss"]


def dist_loss(student_logits: Tensor, teacher_logits: Tensor, beta: float, gamma: float, tau: float) -> Tensor:
    """``tau^2 (beta (1 - mean r over samples) + gamma (1 - mean r over classes))``, ``r`` Pearson's correlation.

    ``r`` compares student and teacher after a softmax at temperature ``tau``: the probabilities of one sample over all
    classes (a row), and those of one class over all samples of the batch (a column). It is 0 if one side is constant,
    as every column in a batch of one sample.

    Args:
        student_logits: ``[B, C]``; half precision is computed in float32, float64 stays.
        teacher_logits: ``[B, C]``; gets no gradient.
        beta: weight of the relation between the classes of each sample, at least 0.
        gamma: weight of the relation between the samples in each class, at least 0.
        tau: temperature, above 0.

    Returns:
        Scalar.

    Raises:
        ValueError: if the logits differ in shape, or an argument is out of range.

    Source: arXiv 2205.10536, equations 5 to 10; ``tau^2`` and the 1e-8 added to the norms are from the official code.
    """
    check_logits(student_logits, teacher_logits)
    check_positive(tau=tau)
    check_numbers(least=0, beta=beta, gamma=gamma)
    student, teacher = at_least_float32(student_logits, teacher_logits.detach())
    student, teacher = (student / tau).softmax(1), (teacher / tau).softmax(1)
    between_classes = 1 - _correlation(student, teacher, 1).mean()
    between_samples = 1 - _correlation(student, teacher, 0).mean()
    return tau**2 * (beta * between_classes + gamma * between_samples)


def _correlation(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """Pearson's correlation along ``dim``; 0 if one of the two is constant, without gradient if ``a`` is."""
    constant = (a == a.narrow(dim, 0, 1)).all(dim, keepdim=True)  # without the mask its gradient would be 1e8
    a, b = (a - a.mean(dim, keepdim=True)).masked_fill(constant, 0), b - b.mean(dim, keepdim=True)
    return (a * b).sum(dim) / (a.norm(dim=dim) * b.norm(dim=dim) + 1e-8)


class DIST(Distillation):
    """DIST (Huang et al., NeurIPS 2022, arXiv 2205.10536): match correlations instead of exact probabilities.

    The outputs of a strong teacher differ so much from the student's that matching them exactly is difficult. DIST
    requires only that they are correlated: over the classes of each sample, and over the samples for each class (see
    ``dist_loss``).

    Several processes: correlations are over each process's own batch.

    Args:
        student: see ``Distillation``.
        teacher: see ``Distillation``.
        num_classes: see ``Task``.
        beta: weight of the relation between the classes of each sample.
        gamma: weight of the relation between the samples in each class.
        tau: temperature of both softmax outputs: 1 on ImageNet, 4 on CIFAR.
        ce_weight: weight of the cross-entropy.
        kd_weight: weight of ``dist_loss``: 1 on ImageNet, 2 on CIFAR.
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
        beta: float = 1.0,
        gamma: float = 1.0,
        tau: float = 1.0,
        ce_weight: float = 1.0,
        kd_weight: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(student, teacher, num_classes, ce_weight=ce_weight, kd_weight=kd_weight, **kwargs)
        check_numbers(least=0, beta=beta, gamma=gamma)
        check_numbers(above=0, tau=tau)
        self.beta, self.gamma, self.tau = beta, gamma, tau

    def distillation_loss(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
        return dist_loss(student_logits, teacher_logits, self.beta, self.gamma, self.tau)
