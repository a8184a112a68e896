"""What the distillation methods share: a student that learns and a teacher that does not."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_kd.core.batch import as_batch
from lightning_kd.core.losses import at_least_float32
from lightning_kd.core.taps import find_classifier
from lightning_kd.core.task import Task
from lightning_kd.core.weights import load_weights, pretrained_network

__all__ = ["Distillation"]


class Distillation(Task, ABC):
    """Train a student with ``ce_weight * cross-entropy + kd_weight * distillation_loss``.

    Your own method is a subclass with one method::

        class Mine(Distillation):
            def distillation_loss(self, student_logits, teacher_logits, target):
                return (student_logits - teacher_logits).square().mean()

    The teacher stays in eval mode, gets no gradient, is not handed to the optimizer and is not in the checkpoint. Its
    accuracy is logged once, as ``val/teacher_acc``, with a warning if it is near chance. After ``fit`` the run folder
    holds ``student.pt``, the plain student.

    Several processes: each has a copy of the teacher; losses are means over the process's batch.

    Args:
        student: network name or any ``nn.Module`` that gives logits ``[B, C]``.
        teacher: network name or ``nn.Module``. A module given without ``teacher_weights`` is taken as trained; it is
            frozen in place.
        num_classes: see ``Task``.
        input_shape: see ``Task``.
        teacher_weights: a checkpoint or ``state_dict`` file; ``"default"`` for the published weights of a
            ``timm/`` or ``torchvision/`` network; ``"random"`` for an untrained teacher (only to try things out).
        student_weights: file to start the student from. Default: from scratch.
        ce_weight: weight of the cross-entropy.
        kd_weight: weight of the distillation loss.
        teacher_mean: per-channel mean that the teacher's images were normalised with, where it differs from the data
            module's; with ``teacher_std``.
        teacher_std: likewise the standard deviation.
        kwargs: ``optimizer``, ``lr_scheduler``, ``lr_interval``, ``channels_last``, ``compile`` of ``Task``.

    Raises:
        ValueError: if the teacher has no weights or another number of classes, or is the student itself.
    """

    teacher_scale: Tensor
    teacher_shift: Tensor

    def __init__(
        self,
        student: str | nn.Module,
        teacher: str | nn.Module,
        num_classes: int,
        input_shape: Sequence[int] = (3, 32, 32),
        teacher_weights: str | None = None,
        student_weights: str | None = None,
        ce_weight: float = 1.0,
        kd_weight: float = 1.0,
        teacher_mean: Sequence[float] | None = None,
        teacher_std: Sequence[float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_classes, input_shape, **kwargs)
        if student is teacher and isinstance(student, nn.Module):
            raise ValueError("student and teacher are one module: give the teacher its own copy")
        if (teacher_mean is None) != (teacher_std is None):
            raise ValueError("give teacher_mean and teacher_std together, or neither")
        self.student = self.build(student)
        if student_weights is not None:
            load_weights(self.student, student_weights, num_classes)
        self.teacher = self._frozen_teacher(teacher, teacher_weights)
        self.ce_weight = ce_weight
        self.kd_weight = kd_weight
        self.teacher_mean, self.teacher_std = teacher_mean, teacher_std
        if teacher_mean is not None and teacher_std is not None:
            if not len(teacher_mean) == len(teacher_std) == self.input_shape[0]:
                raise ValueError(f"teacher_mean and teacher_std need {self.input_shape[0]} values, one a channel")
            shape = (-1, *[1] * (len(self.input_shape) - 1))
            for name in ("teacher_scale", "teacher_shift"):  # filled in setup, from the data module's own
                self.register_buffer(name, torch.ones(len(teacher_mean)).view(shape), persistent=False)
        self._teacher_hits: Tensor | None = None
        self._teacher_judged = False

    @abstractmethod
    def distillation_loss(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
        """The method's own loss, a scalar, before ``kd_weight``.

        Args:
            student_logits: float32 ``[B, C]``, with graph.
            teacher_logits: float32 ``[B, C]``, without.
            target: int64 ``[B]``.
        """

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch = as_batch(batch)
        student_logits, teacher_logits = at_least_float32(self(batch.image), self.teacher_logits(batch.image))
        ce = F.cross_entropy(student_logits, batch.target)
        kd = self.distillation_loss(student_logits, teacher_logits, batch.target)
        return self.step_loss({"ce": self.ce_weight * ce, "kd": self.kd_weight * kd}, student_logits, batch.target)

    @property
    def main_network(self) -> nn.Module:
        return self.student

    def exports(self) -> dict[str, nn.Module]:
        return {"student": self.student}

    # -- the teacher -------------------------------------------------------------------------------------------------

    def _frozen_teacher(self, teacher: str | nn.Module, weights: str | None) -> nn.Module:
        if isinstance(teacher, str) and weights is None:
            raise ValueError(
                f"teacher {teacher!r} has no weights: set teacher_weights to a checkpoint or state_dict file, "
                "to 'default' for a timm/ or torchvision/ network's published ones, or to 'random' to try things out"
            )
        if weights == "default":
            if not isinstance(teacher, str):
                raise ValueError("teacher_weights 'default' needs the teacher by name, got a module")
            teacher = pretrained_network(teacher, self.num_classes)
        network = self.build(teacher)
        if weights not in (None, "default", "random"):
            try:
                load_weights(network, weights, self.num_classes)
            except FileNotFoundError as error:
                raise FileNotFoundError(
                    f"teacher_weights: {error}. Train the teacher first, or set 'random' where only the student is "
                    "evaluated"
                ) from error
        try:
            classes = find_classifier(network)[1].out_features
        except ValueError:  # no linear layer: the first batch tells
            classes = self.num_classes
        if classes != self.num_classes:
            raise ValueError(f"the teacher has {classes} classes, the data {self.num_classes}: train or name another")
        return network.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Distillation:
        super().train(mode)
        self.teacher.eval()
        return self

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            frozen = sum(not module.training for module in self.modules())
            if frozen == sum(1 for _ in self.teacher.modules()):
                warnings.filterwarnings("ignore", f"Found {frozen} module\\(s\\) in eval mode")
        if self.teacher_mean is not None:
            data: Any = getattr(self.trainer, "datamodule", None)
            if not hasattr(data, "mean") or not hasattr(data, "std"):
                raise ValueError("teacher_mean needs a data module with mean and std, to undo its normalisation")
            mean, std, own_mean, own_std = (
                torch.tensor(v, dtype=torch.float32, device=self.device).view_as(self.teacher_scale)
                for v in (data.mean, data.std, self.teacher_mean, self.teacher_std)
            )
            self.teacher_scale.copy_(std / own_std)
            self.teacher_shift.copy_((mean - own_mean) / own_std)

    @torch.no_grad()
    def teacher_logits(self, image: Tensor) -> Tensor:
        """The frozen teacher's logits ``[B, C]``, without gradient."""
        if self.teacher_mean is not None:
            image = image * self.teacher_scale + self.teacher_shift
        logits = self.teacher(self.format_image(image))
        if logits.ndim != 2 or logits.shape[1] != self.num_classes:
            raise ValueError(f"the teacher gives {list(logits.shape)}, expected [B, {self.num_classes}] logits")
        return logits

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        if not self._teacher_judged and not self.trainer.sanity_checking:
            batch = as_batch(batch)
            hits = (self.teacher_logits(batch.image).argmax(1) == batch.target).sum()
            counted = torch.stack([hits, torch.tensor(len(batch.target), device=hits.device)])
            self._teacher_hits = counted if self._teacher_hits is None else self._teacher_hits + counted

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        if self._teacher_hits is not None:
            hits, count = self.trainer.strategy.reduce(self._teacher_hits, reduce_op="sum").tolist()
            self._teacher_hits, self._teacher_judged = None, True
            accuracy = hits / count
            self.log("val/teacher_acc", accuracy)
            chance = 1 / self.num_classes
            if accuracy < min(2 * chance, (1 + chance) / 2):
                rank_zero_warn(
                    f"the teacher's validation accuracy is {accuracy:.1%}, chance is {chance:.1%}: check "
                    "teacher_weights, the class order and the normalisation (teacher_mean, teacher_std)"
                )

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for part in ("state_dict", "current_model_state"):  # the second is WeightAveraging's
            for key in [k for k in checkpoint.get(part, ()) if k.startswith("teacher.")]:
                del checkpoint[part][key]
        checkpoint["teacher_judged"] = self._teacher_judged

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._teacher_judged = checkpoint.get("teacher_judged", False)
        for part in ("state_dict", "current_model_state"):
            if part in checkpoint:
                for key, value in self.teacher.state_dict(prefix="teacher.").items():
                    checkpoint[part].setdefault(key, value)
