"""The base of the distillation methods that learn only from the teacher's outputs, without labels."""

from __future__ import annotations

from abc import ABC
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_kd.core.batch import Batch, as_batch
from lightning_kd.distillation.distillation_task import Distillation

__all__ = ["LabelFreeDistillation"]


def check_no_labels(ce_weight: float) -> None:
    """Raise ``ValueError`` unless the weight of the loss on labels is 0."""
    if isinstance(ce_weight, bool) or ce_weight != 0:
        raise ValueError(f"ce_weight must be 0, as no label is learnt, got {ce_weight!r}: leave it out")


class LabelFreeDistillation(Distillation, ABC):
    """Base of label-free distillation: train with ``kd_weight * distillation_loss`` only, also on unlabelled images.

    An epoch passes over the labelled training samples and, if the data module has them, over its ``unlabelled_indices``
    (see ``unlabelled`` of the data modules), in one shuffled order. A target of -1 means no label; batches of a loader
    of your own may consist of images only. ``train/acc``, validation and test use labelled samples.

    Args:
        student: see ``Distillation``.
        teacher: see ``Distillation``; a list of several teachers is replaced by the mean of their probabilities.
        num_classes: see ``Task``.
        ce_weight: must be 0, as labels are not used.
        kwargs: ``teacher_weights``, ``student_weights``, ``kd_weight``, ``teacher_mean``, ``teacher_std``,
            ``teacher_size``, ``teacher_store`` of ``Distillation``, and arguments of ``FineTunedTask`` and ``Task``.
    """

    several_teachers = True

    def __init__(
        self,
        student: str | nn.Module,
        teacher: str | nn.Module | list[str | nn.Module],
        num_classes: int,
        *,
        ce_weight: float = 0.0,
        **kwargs: Any,
    ) -> None:
        check_no_labels(ce_weight)
        super().__init__(student, teacher, num_classes, ce_weight=ce_weight, **kwargs)

    def training_indices(self, data: Any) -> np.ndarray:
        labelled, unlabelled = super().training_indices(data), getattr(data, "unlabelled_indices", ())
        return np.union1d(labelled, unlabelled) if len(unlabelled) else labelled

    def train_loader(self, data: Any) -> Any:
        data.setup()
        overfit = self.trainer.overfit_batches > 0  # type: ignore[attr-defined]
        options = {"batch_size": data.batch_size, **self.view_options()}
        return data.loader("train", self.training_indices(data), shuffle=not overfit, augment=True, **options)

    def training_target(self, batch: Any) -> Tensor | None:
        target = super().training_target(batch)
        return None if target is None else target + (target == -1)  # class 0 for a missing label, unused

    def training_batch(self, batch: Any) -> Batch:
        """The input of a training step as a ``Batch``; images without targets get targets of -1."""
        if isinstance(batch, Tensor):
            return Batch(batch, torch.full((len(batch),), -1, device=batch.device))
        return as_batch(batch)
