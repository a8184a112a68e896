"""SSLD: the student learns the teacher's distribution with a symmetric loss, from labelled and unlabelled images.

Cheng Cui, Ruoyu Guo, Yuning Du, Dongliang He, Fu Li, Zewu Wu, Qiwen Liu, Shilei Wen, Jizhou Huang, Xiaoguang Hu,
Dianhai Yu, Errui Ding, Yanjun Ma. Beyond Self-Supervision: A Simple Yet Effective Network Distillation Alternative to
Improve Backbones. 2021, arXiv 2103.05959.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_kd.core.losses import at_least_float32, check_logits
from lightning_kd.distillation.label_free_distillation import LabelFreeDistillation

__all__ = ["SSLD", "jensen_shannon_loss", "symmetric_kl_loss"]


def symmetric_kl_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """``1/2 (KL(q || p) + KL(p || q))`` with probabilities ``q`` (teacher) and ``p`` (student), mean over samples.

    The paper calls its loss Jensen-Shannon; its code, followed here, computes half the Jeffreys divergence, which is
    not bounded and about four times as large for similar distributions.

    Args:
        student_logits: ``[B, C]``; half precision is computed in float32, float64 stays.
        teacher_logits: ``[B, C]``; gets no gradient.

    Returns:
        Scalar.

    Raises:
        ValueError: if the logits differ in shape.

    Source: arXiv 2103.05959, as in its code, but with log-softmax instead of logarithms of probabilities clamped at
    1e-12.
    """
    log_student, log_teacher = _log_probabilities(student_logits, teacher_logits)
    return (_divergence(log_teacher, log_student) + _divergence(log_student, log_teacher)).mean() / 2


def jensen_shannon_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Jensen-Shannon divergence: ``1/2 (KL(p || m) + KL(q || m))`` with ``m = (p + q) / 2``, mean over samples.

    It is at most ``log 2``.

    Args:
        student_logits: ``[B, C]``, of ``p``; half precision is computed in float32, float64 stays.
        teacher_logits: ``[B, C]``, of ``q``; gets no gradient.

    Returns:
        Scalar.

    Raises:
        ValueError: if the logits differ in shape.

    Source: Lin, Divergence Measures Based on the Shannon Entropy, IEEE Transactions on Information Theory 1991.
    """
    log_student, log_teacher = _log_probabilities(student_logits, teacher_logits)
    log_mean = torch.logaddexp(log_student, log_teacher) - math.log(2)
    return (_divergence(log_student, log_mean) + _divergence(log_teacher, log_mean)).mean() / 2


def _log_probabilities(student_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    check_logits(student_logits, teacher_logits)
    student, teacher = at_least_float32(student_logits, teacher_logits.detach())
    return student.log_softmax(1), teacher.log_softmax(1)


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """``KL(p || q)`` of each row."""
    p = log_p.exp()
    # a class with p = 0 counts 0, even if both logarithms overflow
    return (p * (log_p - log_q).masked_fill(p == 0, 0)).sum(1)


class SSLD(LabelFreeDistillation):
    """SSLD (Cui et al., 2021, arXiv 2103.05959): learn the teacher's distribution by a symmetric loss, without labels.

    Since no labels are used, any further images can be added: give the data module ``unlabelled``, a folder or array of
    images; they are mixed with the training samples. The second stage of the paper is a second run with the
    ``student_weights`` of the first, on the labelled samples only, with a small learning rate. A loader of your own may
    yield images without targets.

    Several processes: each has a copy of the teacher; the loss is the mean over the process's batch.

    Args:
        student: see ``Distillation``.
        teacher: see ``Distillation``; a list of several teachers is replaced by the mean of their probabilities.
        num_classes: see ``Task``.
        loss: ``"symmetric_kl"`` as in the official code, or ``"jensen_shannon"``, the loss that the paper names.
        kwargs: the further arguments of ``LabelFreeDistillation``.

    Raises:
        ValueError: if ``loss`` is unknown, and see ``LabelFreeDistillation``.
    """

    def __init__(
        self,
        student: str | nn.Module,
        teacher: str | nn.Module | list[str | nn.Module],
        num_classes: int,
        *,
        loss: Literal["symmetric_kl", "jensen_shannon"] = "symmetric_kl",
        **kwargs: Any,
    ) -> None:
        super().__init__(student, teacher, num_classes, **kwargs)
        if loss not in ("symmetric_kl", "jensen_shannon"):
            raise ValueError(f"loss must be 'symmetric_kl' or 'jensen_shannon', got {loss!r}: give one of them")
        self.loss = loss

    def distillation_loss(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
        function = symmetric_kl_loss if self.loss == "symmetric_kl" else jensen_shannon_loss
        return function(student_logits, teacher_logits)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch = self.training_batch(batch)
        logits, teacher_logits = at_least_float32(self(batch.image), self.teacher_logits_for(batch))
        loss = self.kd_weight * self.distillation_loss(logits, teacher_logits, batch.target)
        return self.step_loss({"kd": loss}, logits, batch.target, counted=batch.target >= 0)
