"""The base of the distillation methods that compare feature maps or pooled features."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_kd.argument_checks import naming_argument
from lightning_kd.core.stage_features import StageFeatures, StageMaps
from lightning_kd.distillation.distillation_task import Distillation

__all__ = ["FeatureDistillation"]

Part = TypeVar("Part", bound=nn.Module)


class FeatureDistillation(Distillation):
    """Base of feature distillation: train a student with ``ce_weight * task loss + kd_weight * feature_loss``.

    Your own method is a subclass with one method::

        class Mine(FeatureDistillation):
            def feature_loss(self, student, teacher, target):
                return (student.maps[-1].mean(1) - teacher.maps[-1].mean(1)).square().mean()

    ``student`` and ``teacher`` are ``StageMaps``: ``maps`` are the outputs of the stages, shallow ones first;
    ``before`` are the same before their last activation, if the class asks for them; ``stem`` and ``pooled`` are the
    outputs of the stem and the pooled feature. Their shapes without the batch are known in ``__init__``, as
    ``self.student_features.shapes`` and ``self.teacher_features.shapes``. Create modules that are trained with the
    student, such as a regressor, there with ``self.training_part(module)``: they are in the optimizer and in
    checkpoints, but not in ``student.pt``.

    Several processes: the loss compares the images of each process's own batch.

    Args:
        student: see ``Distillation``.
        teacher: see ``Distillation``.
        num_classes: see ``Task``.
        student_stages: module paths of the student's stages, shallow ones first. Default: found, see ``StageFeatures``.
        teacher_stages: module paths of the teacher's stages, likewise.
        kwargs: the further arguments of ``Distillation`` and ``Task``.

    Raises:
        ValueError: if student and teacher have different numbers of stages; see also ``StageFeatures`` and
            ``Distillation``.
    """

    looks_into_teacher = True
    #: whether the method compares stages, or only pooled features
    uses_stages = True
    #: whether it uses the student's maps before their last activation
    student_before = False
    #: whether it uses the teacher's maps before their last activation
    teacher_before = False
    #: smallest batch for which the loss is defined; for smaller ones, at the end of an epoch, it is 0
    least_batch = 1

    def __init__(
        self,
        student: str | nn.Module,
        teacher: str | nn.Module,
        num_classes: int,
        *,
        student_stages: Sequence[str] | None = None,
        teacher_stages: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(student, teacher, num_classes, **kwargs)
        size = self.teacher.size
        teacher_shape = self.input_shape if size is None else (self.input_shape[0], *size)
        if not self.uses_stages:
            student_stages = teacher_stages = []
        network = self.teacher.network
        with naming_argument("student_stages"):
            self.student_features = StageFeatures(self.student, self.input_shape, student_stages, self.student_before)
        with naming_argument("teacher_stages"):
            self.teacher_features = StageFeatures(network, teacher_shape, teacher_stages, self.teacher_before)
        both = {"student": self.student_features, "teacher": self.teacher_features}
        paths = [", ".join(features.paths) for features in both.values()]
        if len(self.student_features.paths) != len(self.teacher_features.paths):
            raise ValueError(
                f"student and teacher must have as many stages, got {paths[0]} and {paths[1]}: name them in "
                "student_stages and teacher_stages"
            )
        for who, features in both.items():
            if not self.uses_stages and features.shapes.pooled is None:
                raise ValueError(
                    f"{type(self).__name__} compares what enters the classifier, and the {who} {features.name} has no "
                    "nn.Linear: take another network"
                )
        self._training_parts: list[nn.Module] = []

    @abstractmethod
    def feature_loss(self, student: StageMaps, teacher: StageMaps, target: Tensor) -> Tensor:
        """The method's own loss, a scalar, without the factor ``kd_weight``.

        Args:
            student: outputs of the student's stages for the batch, with graph, in the precision of the network.
            teacher: outputs of the teacher's stages, likewise, without graph.
            target: labels of the batch.
        """

    def training_part(self, module: Part) -> Part:
        """Prepare ``module`` to be trained with the student; store the result as an attribute."""
        if self.channels_last:
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._training_parts.append(module)
        return module

    def distillation_loss(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
        student, teacher = self.student_features.pop(), self.teacher_features.pop()
        if len(target) < self.least_batch:
            rank_zero_warn(
                f"the loss of {type(self).__name__} is not defined for a batch of {len(target)} and counts 0 there: "
                "choose a batch_size that leaves no such batch at the end of an epoch"
            )
            idle = [p.sum() for part in self._training_parts for p in part.parameters()]
            return 0.0 * torch.stack([student_logits.sum(), *idle]).sum()  # DDP waits for every parameter
        return self.feature_loss(student, teacher, target)
