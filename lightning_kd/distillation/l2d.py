"""L2D: several labels an image are distilled by the probability and by the embedding of each label.

Penghui Yang, Ming-Kun Xie, Chen-Chen Zong, Lei Feng, Gang Niu, Masashi Sugiyama, Sheng-Jun Huang. Multi-Label Knowledge
Distillation. ICCV 2023, arXiv 2308.06453.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_kd.core.losses import at_least_float32, check_label_values, check_logits, check_shapes

__all__ = ["class_aware_loss", "instance_aware_loss", "multi_label_logits_loss", "partial_softmax_loss"]

# distances that are computed at once, at most: 64 MiB in float32
AT_ONCE = 2**24


def multi_label_logits_loss(
    student_logits: Tensor, teacher_logits: Tensor, reduction: Literal["batchmean", "sum", "mean"] = "batchmean"
) -> Tensor:
    """Each label as a Bernoulli variable: ``KL(Bern(sigmoid(teacher)) || Bern(sigmoid(student)))``.

    Args:
        student_logits: ``[B, C]``; half precision is computed in float32, float64 stays.
        teacher_logits: ``[B, C]``; gets no gradient.
        reduction: ``"batchmean"``, the sum over labels and mean over images; ``"sum"`` or ``"mean"`` over both.

    Raises:
        ValueError: for logits of two shapes, and another reduction.

    Source: arXiv 2308.06453, the MLD loss.
    """
    if reduction not in ("batchmean", "sum", "mean"):
        raise ValueError(f"reduction must be 'batchmean', 'sum' or 'mean', got {reduction!r}: give one of them")
    check_logits(student_logits, teacher_logits)
    student, teacher = at_least_float32(student_logits, teacher_logits.detach())
    on = teacher.sigmoid() * (F.logsigmoid(teacher) - F.logsigmoid(student))
    off = (-teacher).sigmoid() * (F.logsigmoid(-teacher) - F.logsigmoid(-student))
    each = on + off
    return each.mean() if reduction == "mean" else each.sum() / (len(each) if reduction == "batchmean" else 1)


def class_aware_loss(student_embedding: Tensor, teacher_embedding: Tensor, target: Tensor) -> Tensor:
    """For each label, how the images that have it lie to each other: the sum over labels of ``H``.

    ``H`` of ``n`` embeddings is ``1/n sum_ij huber(d_ij / mean(d) - e_ij / mean(e))`` with the distances ``d`` of the
    student and ``e`` of the teacher, whose means are over pairs of different ones. Fewer than three teach nothing.

    Args:
        student_embedding: ``[B, C, L]``; half precision is computed in float32, float64 stays.
        teacher_embedding: ``[B, C, L']``; gets no gradient.
        target: ``[B, C]`` of 1 and 0.

    Raises:
        ValueError: for shapes that do not belong together, and other values in ``target``.

    Source: arXiv 2308.06453, class-aware label-wise embedding distillation; means as in the official code.
    """
    student, teacher, there = _checked(student_embedding, teacher_embedding, target)
    return _relations(student.transpose(0, 1), teacher.transpose(0, 1), there.T)


def instance_aware_loss(student_embedding: Tensor, teacher_embedding: Tensor, target: Tensor) -> Tensor:
    """For each image, how its labels lie to each other: the sum over images of ``H``, see ``class_aware_loss``.

    Args:
        student_embedding: ``[B, C, L]``; half precision is computed in float32, float64 stays.
        teacher_embedding: ``[B, C, L']``; gets no gradient.
        target: ``[B, C]`` of 1 and 0.

    Raises:
        ValueError: for shapes that do not belong together, and other values in ``target``.

    Source: arXiv 2308.06453, instance-aware label-wise embedding distillation; means as in the official code.
    """
    return _relations(*_checked(student_embedding, teacher_embedding, target))


def partial_softmax_loss(student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
    """For each label of an image, the softmax over it and all labels that the image has not, distilled by KL.

    The sum over an image's labels, mean over the batch.

    Args:
        student_logits: ``[B, C]``; half precision is computed in float32, float64 stays.
        teacher_logits: ``[B, C]``; gets no gradient.
        target: ``[B, C]`` of 1 and 0.

    Raises:
        ValueError: for shapes that differ, and other values in ``target``.

    Source: the partial softmax distiller that arXiv 2308.06453 compares with.
    """
    check_logits(student_logits, teacher_logits)
    check_shapes(student_logits=(student_logits, "BC"), target=(target, "BC"))
    check_label_values(target, (0, 1))
    student, teacher = at_least_float32(student_logits, teacher_logits.detach())
    there = target > 0
    others = (~there).any(1, keepdim=True)
    # of an image that has all labels each softmax is over one: no loss, and no -inf on the way to it
    absent = ~there | ~others
    s_rest, t_rest = (z.masked_fill(~absent, float("-inf")).logsumexp(1, keepdim=True) for z in (student, teacher))
    s_all, t_all = torch.logaddexp(student, s_rest), torch.logaddexp(teacher, t_rest)
    # the part of KL that the absent labels share: their probabilities are those among themselves, scaled
    among = (teacher - t_rest).masked_fill(~absent, float("-inf")).exp()
    shared = (among * (teacher - student)).sum(1, keepdim=True)
    own = (teacher - t_all).exp() * (teacher - student)
    each = own + (t_rest - t_all).exp() * shared - (t_all - s_all)
    return (each * (there & others)).sum() / len(student)


def _checked(student: Tensor, teacher: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    check_shapes(student_embedding=(student, "BCL"), teacher_embedding=(teacher, "BCM"), target=(target, "BC"))
    check_label_values(target, (0, 1))
    student, teacher = at_least_float32(student, teacher.detach())
    return student, teacher, target > 0


def _relations(student: Tensor, teacher: Tensor, there: Tensor) -> Tensor:
    """The sum over groups of ``H``.

    Args:
        student: ``[G, N, L]``.
        teacher: ``[G, N, L']``.
        there: bool ``[G, N]``, the members of each group.
    """
    size = max(1, AT_ONCE // there.shape[1] ** 2)
    total = student.new_zeros(()) + 0.0 * student.sum()  # with a graph, where no group has two members
    for s, t, members in zip(student.split(size), teacher.split(size), there.split(size), strict=True):
        pair = members[:, :, None] & members[:, None, :]
        pair = pair & ~torch.eye(pair.shape[1], dtype=torch.bool, device=pair.device)
        count = pair.sum((1, 2)).clamp(min=1)
        distances = []
        for embedding in (s, t):
            # not by a product of matrices: it loses what small distances are made of
            d = torch.cdist(embedding, embedding, compute_mode="donot_use_mm_for_euclid_dist").clamp(min=1e-6)
            d = d * pair
            mean = d.sum((1, 2)) / count
            distances.append(d / mean.where(mean > 0, 1.0)[:, None, None])
        loss = F.huber_loss(distances[0], distances[1], reduction="none").sum((1, 2))
        total = total + (loss / members.sum(1).clamp(min=1)).sum()
    return total
