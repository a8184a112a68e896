"""Distillation from stored soft labels of crops: FKD, and FerKD, which replaces unreliable soft labels.

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
from lightning_kd.core.mixing import cut_mix, draw_box, mix
from lightning_kd.core.seeding import numpy_generator
from lightning_kd.core.view_keys import VIEW
from lightning_kd.distillation._fine_epochs import FineEpochs
from lightning_kd.distillation.distillation_task import Distillation
from lightning_kd.distillation.label_free_distillation import check_no_labels

__all__ = ["FKD", "FerKD", "adapt_labels"]


def adapt_labels(soft_target: Tensor, target: Tensor, adapt_below: float, smoothing: float = 0.1) -> Tensor:
    """Replace the soft labels of crops of which the teacher is unsure by the smoothed given label.

    Such crops mostly show background or context instead of the object, and the teacher's output for them is noise.

    Args:
        soft_target: ``[B, C]``, the teacher's probabilities; half precision becomes float32, float64 stays.
        target: int64 ``[B]``.
        adapt_below: if the largest probability of a soft label is below this, the label becomes
            ``(1 - smoothing) * one-hot + smoothing / C``; in [0, 1], 0 changes none.
        smoothing: share of the label that is divided among all classes, in [0, 1).

    Returns:
        ``[B, C]``.

    Raises:
        ValueError: if the shapes do not match, or a number or label is out of range (labels are checked on a CPU only).

    Source: a reconstruction from the abstract of arXiv 2312.17473.
    """
    check_numbers(least=0, most=1, adapt_below=adapt_below)
    check_numbers(least=0, below=1, smoothing=smoothing)
    check_target(soft_target, target)
    (q,) = at_least_float32(soft_target)
    hard = F.one_hot(target, q.shape[1]).to(q) * (1 - smoothing) + smoothing / q.shape[1]
    return torch.where(q.amax(1, keepdim=True) < adapt_below, hard, q)


class FKD(Distillation):
    """Fast knowledge distillation (Shen and Xing, ECCV 2022, arXiv 2112.01528): train on stored soft labels of crops.

    The teacher runs once, before training: ``lightning-kd teach --views 200 --compress marginal_smoothing_k5`` stores
    200 random crops of each image, as coordinates with the teacher's soft label. With this file as ``teacher_store``
    each visit of an image cuts out ``crops`` of the stored crops. The image file is read once for all of them, and the
    batch is ``crops`` times larger. Only the soft labels are learnt, at the temperature of ``teach --temperature``;
    given labels are not used.

    A pass over the data shows each image ``crops`` times and counts as that many epochs: for a schedule of 300 epochs
    with 4 crops set ``--trainer.max_epochs 75``. In the last ``fine_epochs`` epochs of the Trainer each visit returns
    one crop, and a batch has ``crops`` times as many images. Such an epoch has as many steps as the others and is
    ``crops`` passes over the images; with 4 crops ``--trainer.val_check_interval 0.25`` validates after each pass.
    Images in memory work likewise, with stored crops and flips. Without a store the teacher runs during training, on
    one random crop of each image.

    ``mixup`` and ``cutmix`` mix each crop of a batch with another crop of it, and their soft labels by the same share.

    Several processes: losses are means over the process's batch.

    Args:
        student: see ``Distillation``.
        teacher: see ``Distillation``.
        num_classes: see ``Task``.
        crops: number of stored crops of an image per visit, at least 1.
        fine_epochs: number of the Trainer's last epochs with one crop per visit, at least 0; above 0 it needs a store
            and ``trainer.max_epochs``.
        mixup: ``alpha`` of Mixup, which draws its share from ``Beta(alpha, alpha)``: 0.8 in the paper; 0 for no Mixup.
        cutmix: ``alpha`` of CutMix, which draws its box's share of the area from ``Beta(alpha, alpha)``: 1 in the
            paper; 0 for no CutMix. With both, each batch is mixed by one of them, with equal probability.
        temperature: temperature of the student's softmax, above 0.
        ce_weight: must be 0, as labels are not used.
        kd_weight: weight of the loss on soft labels.
        kwargs: the further arguments of ``Distillation`` and ``Task``.

    Raises:
        ValueError: if an argument is out of range; in a fit, if the store has fewer than ``crops`` views of an image.
    """

    def __init__(
        self,
        student: str | nn.Module,
        teacher: str | nn.Module,
        num_classes: int,
        *,
        crops: int = 4,
        fine_epochs: int = 0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        temperature: float = 1.0,
        ce_weight: float = 0.0,
        kd_weight: float = 1.0,
        **kwargs: Any,
    ) -> None:
        check_no_labels(ce_weight)
        super().__init__(student, teacher, num_classes, ce_weight=ce_weight, kd_weight=kd_weight, **kwargs)
        check_numbers(least=1, whole=True, crops=crops)
        check_numbers(above=0, temperature=temperature)
        check_numbers(least=0, whole=True, fine_epochs=fine_epochs)
        check_numbers(least=0, mixup=mixup, cutmix=cutmix)
        if fine_epochs and self.teacher_store is None:
            raise ValueError(
                f"fine_epochs={fine_epochs} needs a teacher_store, got none: give a store, or set fine_epochs to 0"
            )
        if cutmix and len(self.input_shape) != 3:
            raise ValueError(f"cutmix={cutmix} needs images, got input_shape {self.input_shape}: set cutmix to 0")
        self.crops, self.temperature = crops, temperature
        self.fine_epochs, self.mixup, self.cutmix = fine_epochs, mixup, cutmix

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if self._store is not None and self.crops > (views := self._store.layout.keys):
            raise ValueError(
                f"crops must be {views} or fewer, the views of an image in teacher_store {self.teacher_store!r}, got "
                f"{self.crops}: give fewer, or store more by lightning-kd teach --views"
            )

    def crops_of(self, epoch: int) -> int:
        """The number of crops of an image per visit in an epoch.

        Raises:
            ValueError: with ``fine_epochs``, if the Trainer has no ``max_epochs``.
        """
        if not self.fine_epochs:
            return self.crops
        epochs = self.trainer.max_epochs
        if epochs is None or epochs < 0:
            raise ValueError(f"fine_epochs={self.fine_epochs} needs trainer.max_epochs, got {epochs}: set it")
        return 1 if epoch >= epochs - self.fine_epochs else self.crops

    def view_options(self) -> dict[str, Any]:
        options = super().view_options()
        if "view_keys" in options:
            options["view_keys"] = replace(options["view_keys"], per_visit=self.crops)
        return options

    def train_loader(self, data: Any) -> Any:
        if not self.fine_epochs:
            return super().train_loader(data)
        self.crops_of(0)  # raises if max_epochs is missing
        options, overfit = self.view_options(), self.trainer.overfit_batches > 0  # type: ignore[attr-defined]
        coarse, fine = (
            data.loader(
                "train",
                shuffle=not overfit,
                augment=True,
                batch_size=data.batch_size * self.crops // crops,
                **options | {"view_keys": replace(options["view_keys"], per_visit=crops)},
            )
            for crops in (self.crops, 1)
        )
        return FineEpochs(coarse, fine, lambda epoch: self.crops_of(epoch) == 1)

    def soft_labels_for(self, batch: Batch) -> Tensor:
        """The soft labels of a batch, probabilities ``[B, C]``."""
        if self._store is not None and batch.index is not None and VIEW in batch.extras:
            return self._store.probabilities(batch.index, batch.extras[VIEW])
        return self.teacher_logits_for(batch).float().softmax(1)

    def distillation_loss(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
        return soft_cross_entropy(student_logits / self.temperature, teacher_logits.softmax(1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch = as_batch(batch)
        return self._learn(*self._mixed(batch.image, self.soft_labels_for(batch)), batch.target)

    def _mixed(self, image: Tensor, soft_target: Tensor) -> tuple[Tensor, Tensor]:
        """The batch mixed by Mixup or CutMix, with one draw per batch; with both, each in half of the steps."""
        if not (self.mixup or self.cutmix):
            return image, soft_target
        draw = numpy_generator(self.run_seed, "mixed_crops", self.trainer.global_step, self.global_rank)
        by_box = bool(self.cutmix) and (not self.mixup or draw.random() < 0.5)
        partner = torch.from_numpy(draw.permutation(len(image))).to(image.device)
        if not by_box:
            share = float(draw.beta(self.mixup, self.mixup))
            return mix(image, partner, share), mix(soft_target, partner, share)
        height, width = image.shape[-2:]
        box = draw_box(draw, self.cutmix, height, width)
        return cut_mix(image, partner, box), mix(soft_target, partner, 1 - box.area / (height * width))

    def _learn(self, image: Tensor, soft_target: Tensor, target: Tensor) -> Tensor:
        (logits,) = at_least_float32(self(image))
        loss = self.kd_weight * soft_cross_entropy(logits / self.temperature, soft_target)
        return self.step_loss({"kd": loss}, logits, target)


class FerKD(FKD):
    """FerKD (Shen, ICCV 2023, arXiv 2312.17473): FKD that replaces the soft labels of which the teacher is unsure.

    A crop of which the teacher is unsure probably shows background or context. Its soft label is replaced by the given
    label, smoothed (``adapt_labels``). SelfMix puts a region of another crop of the same image into each crop and mixes
    both labels by area; as both crops show the same image, the label hardly changes.

    This is a reconstruction from the abstract.

    Several processes: losses are means over the process's batch.

    Args:
        student: see ``Distillation``.
        teacher: see ``Distillation``.
        num_classes: see ``Task``.
        adapt_below: soft labels whose largest probability is below this are replaced, in [0, 1]; 0 for none.
        smoothing: label smoothing of the replacements, in [0, 1).
        self_mix: probability that a batch is mixed by SelfMix, in [0, 1]; needs ``crops`` of at least 2. ``mixup`` and
            ``cutmix`` mix the other batches, and those of the last ``fine_epochs``.
        kwargs: ``crops``, ``fine_epochs``, ``mixup``, ``cutmix``, ``temperature``, ``kd_weight`` of ``FKD``, and the
            further arguments of ``Distillation`` and ``Task``.

    Raises:
        ValueError: if an argument is out of range, and see ``FKD``.
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
        crops = self.crops_of(self.current_epoch)
        if self._store is not None and self.self_mix and crops > 1 and float(torch.rand(())) < self.self_mix:
            return self._learn(*mix_crops(image, soft_target, crops), batch.target)
        return self._learn(*self._mixed(image, soft_target), batch.target)


def mix_crops(image: Tensor, soft_target: Tensor, crops: int) -> tuple[Tensor, Tensor]:
    """SelfMix: paste a box of the next crop of the same image into each crop, and mix the labels by area.

    The box is drawn once for the batch.

    Args:
        image: ``[B * crops, C', H, W]``, crops of the same image consecutively.
        soft_target: ``[B * crops, C]``.
        crops: number of crops per image.

    Returns:
        mixed images and labels, of the same shapes.
    """
    height, width = image.shape[-2:]
    share = float(torch.rand(())) ** 0.5  # of each side; the area is then uniform, as with Beta(1, 1)
    sides = [max(1, round(share * length)) for length in (height, width)]
    top, left = (int(torch.randint(length - side + 1, ())) for length, side in zip((height, width), sides, strict=True))
    box = (..., slice(top, top + sides[0]), slice(left, left + sides[1]))
    other = torch.from_numpy(np.arange(len(image)).reshape(-1, crops)).roll(-1, 1).flatten().to(image.device)
    mixed = image.clone()
    mixed[box] = image[other][box]
    area = sides[0] * sides[1] / (height * width)
    return mixed, (1 - area) * soft_target + area * soft_target[other]
