"""Contrastive representation distillation: match embeddings of the same image, separate those of other classes.

Yonglong Tian, Dilip Krishnan, Phillip Isola. Contrastive Representation Distillation. ICLR 2020, arXiv 1910.10699.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_kd.argument_checks import check_numbers, naming_argument
from lightning_kd.core.batch import Batch, as_batch
from lightning_kd.core.distributed import joint_batch, process_rank, summed
from lightning_kd.core.feature_hooks import penultimate_tap
from lightning_kd.core.kept_precision import KeptPrecision
from lightning_kd.core.losses import at_least_float32
from lightning_kd.core.sample_memories import SampleMemories
from lightning_kd.core.sample_memory import SampleMemory
from lightning_kd.core.seeding import torch_generator
from lightning_kd.core.two_pass_step import second_pass
from lightning_kd.distillation._negative_images import NegativeImages
from lightning_kd.distillation.distillation_task import Distillation

__all__ = ["CRD", "ContrastBanks", "contrast_loss"]

EPS = 1e-7


def contrast_loss(score: Tensor, count: int) -> Tensor:
    """Noise-contrastive estimation: tell the sample's own score from the scores of the negatives.

    For a score ``P`` and ``m = K / count``: ``-log(P / (P + m))`` for the own score plus ``-log(m / (P + m))`` for each
    negative, mean over the batch. As in the usual code, 1e-7 is added to the denominators.

    Args:
        score: ``[N, 1 + K]``, above 0, the own score first; half precision is computed in float32, float64 stays.
        count: number of training samples, from which negatives are drawn, at least 1.

    Returns:
        Scalar.

    Raises:
        ValueError: if the shape is wrong or has no negatives, or ``count`` is below 1.

    Source: arXiv 1910.10699, equations 17 and 18.
    """
    check_numbers(least=1, whole=True, count=count)
    if score.ndim != 2 or score.shape[1] < 2:
        raise ValueError(f"score must be [N, 1 + K] with K at least 1, got {list(score.shape)}: give negatives")
    (score,) = at_least_float32(score)
    noise = (score.shape[1] - 1) / count
    own, others = score[:, 0], score[:, 1:]
    total = (own / (own + (noise + EPS))).log().sum() + (noise / (others + (noise + EPS))).log().sum()
    return -total / len(score)


class ContrastBanks(KeptPrecision):
    """Two memory banks with the latest embedding of every training image, one of the student and one of the teacher.

    The student's embedding is scored against the teacher's bank, and vice versa. A score is
    ``exp(<row, embedding> / temperature) / z``, where ``z`` is the mean over the first batch times the number of rows.
    After the loss is computed, the rows of the batch move towards the new embeddings.

    Several processes: rows and ``z`` are those of the joint batch, equal on all processes.

    Args:
        dim: length of an embedding.
        temperature: temperature of the scores, above 0.
        momentum: weight of the old row in each update, at least 0 and below 1.

    Attributes:
        student: bank of the student: float32 rows ``[n, dim]``, of length 1 after their first update.
        teacher: bank of the teacher, likewise.
        z: ``[2]``, for the student's and the teacher's scores; -1 before the first batch.
    """

    z: Tensor

    def __init__(self, dim: int = 128, temperature: float = 0.07, momentum: float = 0.5) -> None:
        super().__init__()
        check_numbers(least=1, whole=True, dim=dim)
        check_numbers(above=0, temperature=temperature)
        check_numbers(least=0, below=1, momentum=momentum)
        self.dim, self.temperature, self.momentum = dim, temperature, momentum
        self.student, self.teacher = SampleMemory((dim,)), SampleMemory((dim,))
        self.register_buffer("z", torch.full((2,), -1.0))
        self.keep_precise("z")  # as large as the number of rows, which can be above the largest float16 number
        self._has_z = False  # kept here, as reading it from a GPU in each step is slow
        self.register_load_state_dict_post_hook(_look_for_z)

    def allocate(self, count: int, generator: torch.Generator) -> None:
        """Create ``count`` rows, uniform in +-1 / sqrt(dim / 3), unless rows exist.

        Args:
            count: number of training images.
            generator: source of the random numbers, on the CPU, equal on all processes.
        """
        width = 1 / math.sqrt(self.dim / 3)
        for memory in (self.student, self.teacher):
            if len(memory.rows) == 0:
                memory.rows = torch.rand(count, self.dim, generator=generator) * (2 * width) - width
            memory.allocate(count, self.z.device)

    def forward(self, student: Tensor, teacher: Tensor, row: Tensor, negatives: Tensor) -> Tensor:
        """The sum of both losses, a scalar; afterwards the rows of the batch are updated.

        Args:
            student: embeddings ``[B, dim]`` of length 1; half precision is computed in float32, float64 stays.
            teacher: embeddings of the same images, likewise; both embeddings get gradient.
            row: int64 ``[B]``, the rows of these images.
            negatives: int64 ``[B, K]``, rows of images of other classes.
        """
        with torch.autocast(student.device.type, enabled=False):
            student, teacher = at_least_float32(student, teacher)
            chosen = torch.cat([row[:, None], negatives], 1)
            scores = self._scores(student, self.teacher, chosen), self._scores(teacher, self.student, chosen)
            if not self._has_z:
                self._set_z(*scores)
            count = len(self.student.rows)
            z = self.z.to(scores[0].dtype)
            loss = contrast_loss(scores[0] / z[0], count) + contrast_loss(scores[1] / z[1], count)
            if not second_pass():
                self._move(row, student.detach(), teacher.detach())
            return loss

    def _scores(self, embedding: Tensor, bank: SampleMemory, chosen: Tensor) -> Tensor:
        # computing all products and selecting some takes 1 / 25 of the time of selecting rows of 128 values per sample;
        # the rows are copied, because they change before the gradient is computed
        products = embedding @ bank.rows.to(embedding.dtype, copy=True).T
        return (products.gather(1, chosen) / self.temperature).exp()

    @torch.no_grad()
    def _set_z(self, student: Tensor, teacher: Tensor) -> None:
        sums = summed(torch.stack([student.sum(), teacher.sum(), student.new_tensor(student.numel())]))
        self.z.copy_(sums[:2] / sums[2] * len(self.student.rows))
        self._has_z = True

    @torch.no_grad()
    def _move(self, row: Tensor, student: Tensor, teacher: Tensor) -> None:
        row, seen = joint_batch(row), joint_batch(torch.stack([student, teacher], 1))
        for side, memory in enumerate((self.student, self.teacher)):
            moved = self.momentum * memory.rows[row].to(seen.dtype) + (1 - self.momentum) * seen[:, side]
            memory.rows[row] = F.normalize(moved).to(memory.rows.dtype)


def _look_for_z(banks: ContrastBanks, _: Any) -> None:
    banks._has_z = bool((banks.z > 0).all())


class CRD(SampleMemories, Distillation):
    """Contrastive representation distillation (Tian et al., ICLR 2020, arXiv 1910.10699).

    The pooled features of student and teacher are mapped to embeddings by a trained linear layer each. The two
    embeddings of an image are made similar to each other, and dissimilar to stored embeddings of ``negatives`` images
    of other classes (see ``ContrastBanks``). Embedding layers and banks are used only in training.

    Negatives depend only on the seed, the epoch and the step. Without a data module of this package the ``DataLoader``
    must yield ``(image, target, index)``, and its data set must have the labels as ``targets``, or be a
    ``TensorDataset`` with labels as second tensor.

    Several processes: embeddings are exchanged in each step, so that banks and negatives equal those of a single
    process with the joint batch.

    Args:
        student: see ``Distillation``; it needs a linear classifier, whose input is the pooled feature.
        teacher: see ``Distillation``; it needs a linear classifier too.
        num_classes: see ``Task``.
        dim: length of the embeddings.
        negatives: number of images of other classes per sample; drawn with replacement if there are fewer.
        temperature: temperature of the scores, above 0.
        momentum: weight of the old row in each update of a bank, at least 0 and below 1.
        classifier: module path of the student's classifier. Default: its last ``nn.Linear``.
        teacher_classifier: module path of the teacher's classifier. Default: its last ``nn.Linear``.
        ce_weight: weight of the cross-entropy.
        kd_weight: weight of the contrastive loss.
        kwargs: the further arguments of ``Distillation`` and ``Task``.

    Raises:
        ValueError: if an argument is out of range; in a fit, if all samples have one class, batches have no index, or
            labels cannot be found by index.
    """

    looks_into_teacher = True

    def __init__(
        self,
        student: str | nn.Module,
        teacher: str | nn.Module,
        num_classes: int,
        *,
        dim: int = 128,
        negatives: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
        classifier: str | None = None,
        teacher_classifier: str | None = None,
        ce_weight: float = 1.0,
        kd_weight: float = 0.8,
        **kwargs: Any,
    ) -> None:
        super().__init__(student, teacher, num_classes, ce_weight=ce_weight, kd_weight=kd_weight, **kwargs)
        check_numbers(least=1, whole=True, negatives=negatives)
        self.negatives = negatives
        self.banks = ContrastBanks(dim, temperature, momentum)
        self.memories = {"student_bank": self.banks.student, "teacher_bank": self.banks.teacher}
        self._student_feature, linear = penultimate_tap(self.student, classifier)
        self.student_embedding = nn.Linear(linear.in_features, dim)
        with naming_argument("teacher_classifier"):
            self._teacher_feature, linear = penultimate_tap(self.teacher.network, teacher_classifier)
        self.teacher_embedding = nn.Linear(linear.in_features, dim)
        self._step: tuple[Tensor, Tensor] | None = None

    def training_labels(self) -> tuple[Tensor, Tensor, int]:
        """Indices and labels, int64 ``[n]``, of the training samples in use, and the size of the full training array.

        Raises:
            ValueError: if the labels cannot be found by index.
        """
        data: Any = getattr(self.trainer, "datamodule", None)
        if hasattr(data, "train_target") and hasattr(data, "train_indices"):
            index = torch.as_tensor(data.train_indices)
            return index, data.train_target[index], len(data.train_target)
        samples = getattr(self.trainer.train_dataloader, "dataset", None)
        tensors: Any = getattr(samples, "tensors", ())
        labels = getattr(samples, "targets", tensors[1] if len(tensors) > 1 else None)
        if labels is None:
            raise ValueError(
                f"CRD must find the label of each training sample by its index, got a {type(samples).__name__} without "
                "targets: use one of our data modules, or a data set with an attribute targets"
            )
        labels = torch.as_tensor(labels)
        return torch.arange(len(labels)), labels, len(labels)

    def sample_count(self) -> int:
        return len(self.training_labels()[0])

    def on_train_start(self) -> None:
        index, labels, total = self.training_labels()
        self.banks.allocate(len(index), torch_generator(self.run_seed, "contrast_banks"))
        super().on_train_start()
        self._row = torch.full((total,), -1, device=self.device)
        self._row[index.to(self.device)] = torch.arange(len(index), device=self.device)
        self._images = NegativeImages(labels.to(self.device), self.negatives)

    def index_of(self, batch: Batch) -> Tensor:
        """The rows of the batch's samples in the banks, int64 ``[B]``."""
        if batch.index is None:
            return super().index_of(batch)  # raises the error
        on_cpu = batch.index.device.type == "cpu"
        row = None if on_cpu and int(batch.index.max()) >= len(self._row) else self._row[batch.index]
        if row is None or (on_cpu and int(row.min()) < 0):
            raise ValueError(
                f"index must be that of a training sample in use, of {len(self._row)} in all, got up to "
                f"{int(batch.index.max())}: let the loader yield positions in the data set that it was made from"
            )
        return row

    def draw_negatives(self, batch: Batch, batch_idx: int) -> Tensor:
        """Draw rows of images of other classes, int64 ``[B, negatives]``.

        Raises:
            ValueError: if targets are not class indices, for example those of mixed images.
        """
        if batch.target.ndim != 1 or batch.target.dtype != torch.int64:
            raise ValueError(
                f"target must be int64 [B], got {batch.target.dtype} {list(batch.target.shape)}: CRD needs one "
                "class per image, so do not mix images"
            )
        stream = torch_generator(
            self.run_seed, "negative_images", self.current_epoch, batch_idx, device=batch.target.device
        )
        return self._images.draw(batch.target, stream, skip=process_rank() * len(batch.target))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch = as_batch(batch)
        self._step = self.index_of(batch), self.draw_negatives(batch, batch_idx)
        return super().training_step(batch, batch_idx)

    def distillation_loss(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
        assert self._step is not None
        student = _embedded(self._student_feature.pop(), self.student_embedding)
        teacher = _embedded(self._teacher_feature.pop(), self.teacher_embedding)
        return self.banks(student, teacher, *self._step)


def _embedded(feature: Tensor, embedding: nn.Linear) -> Tensor:
    with torch.autocast(feature.device.type, enabled=False):
        (rows,) = at_least_float32(embedding(feature.to(embedding.weight.dtype)))
        return F.normalize(rows)
