"""Distillation from soft labels of crops that were stored before: FKD, and FerKD, which mends those it cannot trust.

Zhiqiang Shen, Eric Xing. A Fast Knowledge Distillation Framework for Visual Recognition. ECCV 2022, arXiv 2112.01528.
Zhiqiang Shen. FerKD: Surgical Label Adaptation for Efficient Distillation. ICCV 2023, arXiv 2312.17473.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.batch import Batch, as_batch
from lightning_kd.core.losses import at_least_float32, check_target, soft_cross_entropy
from lightning_kd.core.view_keys import VIEW
from lightning_kd.distillation.distillation_task import Distillation
from lightning_kd.distillation.label_free_distillation import check_no_labels

__all__ = ["FKD", "FerKD", "adapt_labels"]


def adapt_labels(soft_target: Tensor, target: Tensor, adapt_below: float, smoothing: float = 0.1) -> Tensor:
    """Soft labels, but for crops that the teacher is unsure of the given label, smoothed.

    Such crops show background or context rather than the object: what the teacher says there is noise.

    Args:
        soft_target: ``[B, C]``, the teacher's probabilities; half precision becomes float32, float64 stays.
        target: int64 ``[B]``.
        adapt_below: where the largest probability is below it, the label is ``(1 - smoothing) * one-hot +
            smoothing / C``; 0 leaves all as they are, in [0, 1].
        smoothing: in [0, 1).

    Returns:
        ``[B, C]``.

    Raises:
        ValueError: for shapes that do not belong together, numbers out of range, and labels out of range (which only a
            CPU is asked for).

    Source: a reconstruction from the abstract of arXiv 2312.17473.
    """
    check_numbers(least=0, most=1, adapt_below=adapt_below)
    check_numbers(least=0, below=1, smoothing=smoothing)
    check_target(soft_target, target)
    (q,) = at_least_float32(soft_target)
    hard = F.one_hot(target, q.shape[1]).to(q) * (1 - smoothing) + smoothing / q.shape[1]
    return torch.where(q.amax(1, keepdim=True) < adapt_below, hard, q)


class FKD(Distillation):
    """Fast knowledge distillation (Shen and Xing, ECCV 2022, arXiv 2112.01528): soft labels of stored crops alone.

    ``lightning-kd teach --views 200 --compress marginal_smoothing_k5`` stores so many random crops of each image, where
    they are and what the teacher says of them; with that as ``teacher_store`` each visit of an image cuts out
    ``crops`` of them again. The file is read once for all of them, and the batch has so many times its images. What is
    learnt is their labels alone, at ``teach --temperature``.

    A pass over the data shows each image ``crops`` times and so counts as that many epochs: give a schedule of 300
    epochs ``--trainer.max_epochs 75`` with 4 crops. Images in memory work likewise, by crop and flip. Without a store
    the teacher is asked beside the student, for one random crop of each image.

    Several processes: losses are means over the process's batch.

    Args:
        student: see ``Distillation``.
        teacher: see ``Distillation``.
        num_classes: see ``Task``.
        crops: of an image in a visit, from a store.
        temperature: of the student.
        ce_weight: 0, and nothing else.
        kd_weight: weight of the loss.
        kwargs: the further arguments of ``Distillation`` and ``Task``.
    """

    def __init__(
        self,
        student: str | nn.Module,
        teacher: str | nn.Module,
        num_classes: int,
        *,
        crops: int = 4,
        temperature: float = 1.0,
        ce_weight: float = 0.0,
        kd_weight: float = 1.0,
        **kwargs: Any,
    ) -> None:
        check_no_labels(ce_weight)
        super().__init__(student, teacher, num_classes, ce_weight=ce_weight, kd_weight=kd_weight, **kwargs)
        check_numbers(least=1, whole=True, crops=crops)
        check_numbers(above=0, temperature=temperature)
        self.crops, self.temperature = crops, temperature

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if self._store is not None and self.crops > (views := self._store.layout.keys):
            raise ValueError(
                f"crops must be {views} or fewer, the views of an image in teacher_store {self.teacher_store!r}, got "
                f"{self.crops}: give fewer, or store more by lightning-kd teach --views"
            )

    def view_options(self) -> dict[str, Any]:
        options = super().view_options()
        if "view_keys" in options:
            options["view_keys"] = replace(options["view_keys"], per_visit=self.crops)
        return options

    def soft_labels_for(self, batch: Batch) -> Tensor:
        """What is learnt of a batch, probabilities ``[B, C]``."""
        if self._store is not None and batch.index is not None and VIEW in batch.extras:
            return self._store.probabilities(batch.index, batch.extras[VIEW])
        return self.teacher_logits_for(batch).float().softmax(1)

    def distillation_loss(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
        return soft_cross_entropy(student_logits / self.temperature, teacher_logits.softmax(1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch = as_batch(batch)
        return self._learn(batch.image, self.soft_labels_for(batch), batch.target)

    def _learn(self, image: Tensor, soft_target: Tensor, target: Tensor) -> Tensor:
        (logits,) = at_least_float32(self(image))
        loss = self.kd_weight * soft_cross_entropy(logits / self.temperature, soft_target)
        return self.step_loss({"kd": loss}, logits, target)


class FerKD(FKD):
    """FKD that mends the labels of crops that the teacher is unsure of (Shen, ICCV 2023, arXiv 2312.17473).

    A reconstruction from the abstract: such a crop shows background or context, and its soft label becomes the given
    one, smoothed. SelfMix puts a region of another crop of the same image into a crop, so that the label stays close;
    both labels are mixed by area.

    Several processes: losses are means over the process's batch.

    Args:
        student: see ``Distillation``.
        teacher: see ``Distillation``.
        num_classes: see ``Task``.
        adapt_below: crops whose largest stored probability is below it are mended; 0 for none.
        smoothing: of their labels, in [0, 1).
        self_mix: probability that a batch is mixed; needs ``crops`` of 2 or more.
        kwargs: ``crops``, ``temperature``, ``kd_weight`` of ``FKD``, and the further arguments of ``Distillation`` and
            ``Task``.
    """

    def __init__(
        self,
        student: str | nn.Module,
        teacher: str | nn.Module,
        num_classes: int,
        *,
        adapt_below: float = 0.3,
        smoothing: float = 0.1,
        self_mix: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(student, teacher, num_classes, **kwargs)
        check_numbers(least=0, most=1, adapt_below=adapt_below, self_mix=self_mix)
        check_numbers(least=0, below=1, smoothing=smoothing)
        if self_mix and self.crops < 2:
            raise ValueError(f"self_mix={self_mix} mixes crops of one image, got crops={self.crops}: give 2 or more")
        self.adapt_below, self.smoothing, self.self_mix = adapt_below, smoothing, self_mix

    def soft_labels_for(self, batch: Batch) -> Tensor:
        return adapt_labels(super().soft_labels_for(batch), batch.target, self.adapt_below, self.smoothing)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch = as_batch(batch)
        image, soft_target = batch.image, self.soft_labels_for(batch)
        if self._store is not None and self.self_mix and float(torch.rand(())) < self.self_mix:
            image, soft_target = mix_crops(image, soft_target, self.crops)
        return self._learn(image, soft_target, batch.target)


def mix_crops(image: Tensor, soft_target: Tensor, crops: int) -> tuple[Tensor, Tensor]:
    """Put a box of each image's next crop into each crop, at a place that is drawn once, and mix their labels by area.

    Args:
        image: ``[B * crops, C', H, W]``, crops of an image side by side.
        soft_target: ``[B * crops, C]``.
        crops: of each image.
    """
    height, width = image.shape[-2:]
    share = float(torch.rand(())) ** 0.5  # of each side: the area is uniform, as with Beta(1, 1)
    sides = [max(1, round(share * length)) for length in (height, width)]
    top, left = (int(torch.randint(length - side + 1, ())) for length, side in zip((height, width), sides, strict=True))
    box = (..., slice(top, top + sides[0]), slice(left, left + sides[1]))
    other = torch.from_numpy(np.arange(len(image)).reshape(-1, crops)).roll(-1, 1).flatten().to(image.device)
    mixed = image.clone()
    mixed[box] = image[other][box]
    area = sides[0] * sides[1] / (height * width)
    return mixed, (1 - area) * soft_target + area * soft_target[other]
