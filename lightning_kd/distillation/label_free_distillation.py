"""What the distillation methods share that learn from the teacher's answers alone, without labels."""

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
    """Train a student with ``kd_weight * distillation_loss`` alone: images without a label teach as much as others.

    An epoch goes over the labelled training samples and, where the data module has them, over its
    ``unlabelled_indices`` (``unlabelled`` of the data modules), in one order. Targets of -1 are no label, and batches
    of a loader of your own may be images alone. ``train/acc`` is of labelled samples, and so are validation and test.

    Args:
        student: see ``Distillation``.
        teacher: see ``Distillation``, or a list of several, whose mean probabilities are the answer.
        num_classes: see ``Task``.
        ce_weight: 0, and nothing else.
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
        return None if target is None else target + (target == -1)  # any class will do: it is not learnt

    def training_batch(self, batch: Any) -> Batch:
        """What a training step was given, as a ``Batch``; images alone get targets of -1."""
        if isinstance(batch, Tensor):
            return Batch(batch, torch.full((len(batch),), -1, device=batch.device))
        return as_batch(batch)
