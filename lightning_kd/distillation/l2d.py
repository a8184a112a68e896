"""L2D: multi-label distillation of the probability and of the embedding of each label.

Penghui Yang, Ming-Kun Xie, Chen-Chen Zong, Lei Feng, Gang Niu, Masashi Sugiyama, Sheng-Jun Huang. Multi-Label Knowledge
Distillation. ICCV 2023, arXiv 2308.06453.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.batch import as_batch
from lightning_kd.core.distributed import joint_batch, process_count
from lightning_kd.core.feature_hooks import PooledFeature
from lightning_kd.core.losses import at_least_float32, bernoulli_kl, check_label_values, check_logits, check_shapes
from lightning_kd.core.outputs import embeddings_of
from lightning_kd.core.problems import MultiLabel
from lightning_kd.distillation._embedding_distances import sum_over_groups
from lightning_kd.distillation.distillation_task import Distillation
from lightning_kd.distillation.pkt import pkt_loss
from lightning_kd.distillation.rkd import angle_loss, distance_loss

__all__ = ["L2D", "class_aware_loss", "instance_aware_loss", "multi_label_logits_loss", "partial_softmax_loss"]


def multi_label_logits_loss(
    student_logits: Tensor, teacher_logits: Tensor, reduction: Literal["batchmean", "sum", "mean"] = "batchmean"
) -> Tensor:
    """KL divergence for each label as a Bernoulli variable: ``KL(Bern(sigmoid(teacher)) || Bern(sigmoid(student)))``.

    Args:
        student_logits: ``[B, C]``; half precision is computed in float32, float64 stays.
        teacher_logits: ``[B, C]``; gets no gradient.
        reduction: ``"batchmean"``: sum over labels, mean over images; ``"sum"`` or ``"mean"``: over both.

    Returns:
        Scalar.

    Raises:
        ValueError: if the logits differ in shape, or ``reduction`` is unknown.

    Source: arXiv 2308.06453, the MLD loss.
    """
    if reduction not in ("batchmean", "sum", "mean"):
        raise ValueError(f"reduction must be 'batchmean', 'sum' or 'mean', got {reduction!r}: give one of them")
    check_logits(student_logits, teacher_logits)
    student, teacher = at_least_float32(student_logits, teacher_logits.detach())
    each = bernoulli_kl(student, teacher)
    return each.mean() if reduction == "mean" else each.sum() / (len(each) if reduction == "batchmean" else 1)


def class_aware_loss(student_embedding: Tensor, teacher_embedding: Tensor, target: Tensor) -> Tensor:
    """For each label, match the distances between its images: the sum over labels of ``H``.

    For the ``n`` embeddings of a label ``H`` is ``1/n sum_ij huber(d_ij / mean(d) - e_ij / mean(e))``, with distances
    ``d`` of the student and ``e`` of the teacher; means are over pairs of different embeddings. Labels with fewer than
    three images contribute nothing.

    Args:
        student_embedding: ``[B, C, L]``; half precision is computed in float32, float64 stays.
        teacher_embedding: ``[B, C, L']``; gets no gradient.
        target: ``[B, C]`` of 1 and 0.

    Returns:
        Scalar.

    Raises:
        ValueError: if the shapes do not match, or ``target`` has other values.

    Source: arXiv 2308.06453, class-aware label-wise embedding distillation; means as in the official code.
    """
    return sum_over_groups(*_checked(student_embedding, teacher_embedding, target), by_class=True)


def instance_aware_loss(student_embedding: Tensor, teacher_embedding: Tensor, target: Tensor) -> Tensor:
    """For each image, match the distances between its labels: the sum over images of ``H``, see ``class_aware_loss``.

    Args:
        student_embedding: ``[B, C, L]``; half precision is computed in float32, float64 stays.
        teacher_embedding: ``[B, C, L']``; gets no gradient.
        target: ``[B, C]`` of 1 and 0.

    Returns:
        Scalar.

    Raises:
        ValueError: if the shapes do not match, or ``target`` has other values.

    Source: arXiv 2308.06453, instance-aware label-wise embedding distillation; means as in the official code.
    """
    return sum_over_groups(*_checked(student_embedding, teacher_embedding, target), by_class=False)


def partial_softmax_loss(student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
    """For each label of an image, KL divergence of a softmax over it and all labels that the image does not have.

    Sum over an image's labels, mean over the batch.

    Args:
        student_logits: ``[B, C]``; half precision is computed in float32, float64 stays.
        teacher_logits: ``[B, C]``; gets no gradient.
        target: ``[B, C]`` of 1 and 0.

    Returns:
        Scalar.

    Raises:
        ValueError: if the shapes differ, or ``target`` has other values than 1 and 0.

    Source: the partial softmax distillation that arXiv 2308.06453 compares with.
    """
    check_logits(student_logits, teacher_logits)
    check_shapes(student_logits=(student_logits, "BC"), target=(target, "BC"))
    check_label_values(target, (0, 1))
    student, teacher = at_least_float32(student_logits, teacher_logits.detach())
    there = target > 0
    others = (~there).any(1, keepdim=True)
    # if an image has all labels, each softmax is over one label: the loss is 0, and -inf must not occur in between
    absent = ~there | ~others
    s_rest, t_rest = (z.masked_fill(~absent, float("-inf")).logsumexp(1, keepdim=True) for z in (student, teacher))
    s_all, t_all = torch.logaddexp(student, s_rest), torch.logaddexp(teacher, t_rest)
    # the part of KL from the absent labels is the same for all softmaxes, up to a factor
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


class L2D(Distillation):
    """L2D (Yang et al., ICCV 2023, arXiv 2308.06453): multi-label distillation of probabilities and label embeddings.

    Each label of an image is distilled in two ways: by its probability, as a binary decision, and by its embedding. The
    student learns to place the embeddings as the teacher does: those of one label in different images, and those of the
    labels of one image.

    The loss is ``ce_weight * BCE + kd_weight * (lambda_mld * M + lambda_le * (lambda_cd * CD + lambda_id * ID))``:
    ``BCE`` is binary cross-entropy summed over images and labels, ``M`` the loss on logits, ``CD`` and ``ID`` the
    class-aware and the instance-aware loss on embeddings. The weights are those of the official code for batches of 64;
    all terms but ``M`` grow with the batch size. ``feature_loss`` adds methods that the paper compares with.

    With losses on embeddings both networks must give an embedding for each label, like ``resnet18+ml_decoder``; their
    lengths may differ. All labels must be known.

    Several processes: sums are over the joint batch, means over each process's own. The class-aware loss and
    ``feature_loss`` compare images of one process only; ``joint_classes`` changes this for the former.

    Args:
        student: name of a network or ``nn.Module`` that returns logits ``[B, C]`` and embeddings ``[B, C, L]``.
        teacher: name of a network or ``nn.Module``, likewise.
        num_classes: see ``Task``.
        input_shape: see ``Task``.
        logits_loss: the loss ``M``: ``"mld"``: ``multi_label_logits_loss``; ``"ps"``: ``partial_softmax_loss``;
            ``"mse"``: squared difference of the logits, sum over labels and mean over images; ``None``: none.
        lambda_mld: weight of ``M``.
        lambda_le: weight of both losses on embeddings; with 0 networks need not give embeddings.
        lambda_cd: weight of the class-aware loss.
        lambda_id: weight of the instance-aware loss.
        joint_classes: compare the images of all processes in the class-aware loss, as a single process with the joint
            batch would.
        feature_loss: loss on pooled features: ``"rkd"``: 25 times ``distance_loss`` plus 50 times ``angle_loss``;
            ``"pkt"``: 30,000 times ``pkt_loss`` (weights of the usual benchmark); ``None``: none.
        lambda_feature: weight of ``feature_loss``.
        view: augmentation of the training images: ``"weak"`` or, as in the paper, ``"strong"`` (without flips:
            ``data.flip false``).
        kwargs: ``teacher_weights``, ``student_weights``, ``ce_weight``, ``kd_weight``, ``teacher_mean``,
            ``teacher_std``, ``teacher_size`` of ``Distillation``, and the arguments of ``FineTunedTask`` and ``Task``.

    Raises:
        ValueError: if an argument is out of range; in a step, if a network gives no embeddings and they are needed.
    """

    problem_class = MultiLabel
    looks_into_teacher = True
    loss_is_sum = True

    def __init__(
        self,
        student: str | nn.Module,
        teacher: str | nn.Module,
        num_classes: int,
        *,
        input_shape: Sequence[int] = (3, 32, 32),
        logits_loss: Literal["mld", "ps", "mse"] | None = "mld",
        lambda_mld: float = 10.0,
        lambda_le: float = 1.0,
        lambda_cd: float = 100.0,
        lambda_id: float = 1000.0,
        joint_classes: bool = False,
        feature_loss: Literal["rkd", "pkt"] | None = None,
        lambda_feature: float = 1.0,
        view: Literal["weak", "strong"] = "weak",
        **kwargs: Any,
    ) -> None:
        super().__init__(student, teacher, num_classes, input_shape=input_shape, **kwargs)
        if logits_loss not in ("mld", "ps", "mse", None):
            raise ValueError(f"logits_loss must be 'mld', 'ps', 'mse' or None, got {logits_loss!r}: give one of them")
        if feature_loss not in ("rkd", "pkt", None):
            raise ValueError(f"feature_loss must be 'rkd', 'pkt' or None, got {feature_loss!r}: give one of them")
        check_numbers(least=0, lambda_mld=lambda_mld, lambda_le=lambda_le, lambda_cd=lambda_cd, lambda_id=lambda_id)
        check_numbers(least=0, lambda_feature=lambda_feature)
        self.view = view
        self.logits_loss = logits_loss
        self.lambda_mld, self.lambda_le, self.lambda_cd, self.lambda_id = lambda_mld, lambda_le, lambda_cd, lambda_id
        self.joint_classes, self.feature_loss, self.lambda_feature = joint_classes, feature_loss, lambda_feature
        self._features = [PooledFeature(n) for n in (self.student, self.teacher.network)] if feature_loss else []

    def distillation_loss(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
        """The loss ``M`` without its weights; 0 if ``logits_loss`` is ``None``."""
        if self.logits_loss == "ps":
            return partial_softmax_loss(student_logits, teacher_logits, target)
        if self.logits_loss == "mse":
            return (student_logits - teacher_logits.detach()).square().sum(1).mean()
        if self.logits_loss == "mld":
            return multi_label_logits_loss(student_logits, teacher_logits)
        return 0.0 * student_logits.sum()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch = as_batch(batch)
        image, target = batch.image, batch.target
        check_label_values(target, (0, 1))
        output, taught = self.student(self.format_image(image)), self.teacher.output(image)
        logits, teacher_logits = at_least_float32(
            self.problem.logits(output, image, self.student), self.teacher.logits(taught, image)
        )
        bce = F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype), reduction="sum")
        processes = process_count()  # DDP averages gradients over the processes
        terms = {"ce": processes * self.ce_weight * bce}
        if self.logits_loss is not None:
            weight = self.kd_weight * self.lambda_mld
            terms[self.logits_loss] = weight * self.distillation_loss(logits, teacher_logits, target)
        weight = self.kd_weight * self.lambda_le
        if weight:
            embeddings = _embeddings(output, "student"), _embeddings(taught, "teacher")
            terms["cd"] = weight * self.lambda_cd * self._class_aware(*embeddings, target)
            terms["id"] = processes * weight * self.lambda_id * instance_aware_loss(*embeddings, target)
        if self.feature_loss is not None:
            features = self._features[0].pop(), self._features[1].pop()
            terms[self.feature_loss] = self.kd_weight * self.lambda_feature * self._feature_loss(*features)
        return self.step_loss(terms, logits, target)

    def _class_aware(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        if not self.joint_classes:
            return process_count() * class_aware_loss(student, teacher, target)
        # gathering the batches passes on the gradients of all processes
        return class_aware_loss(joint_batch(student), joint_batch(teacher), joint_batch(target))

    def _feature_loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        if len(student) < 2:  # a single image at the end of an epoch
            return 0.0 * student.sum()
        if self.feature_loss == "pkt":
            return 30_000 * pkt_loss(student, teacher)
        return 25 * distance_loss(student, teacher) + 50 * angle_loss(student, teacher)


def _embeddings(output: Any, who: str) -> Tensor:
    found = embeddings_of(output)
    if found is None:
        raise ValueError(
            f"the {who} must give an embedding of each label beside the logits, got {type(output).__name__}: use a "
            "network NAME+ml_decoder, or set lambda_le to 0"
        )
    return found
