"""The base of the distillation methods: a student that is trained, and a teacher that is frozen."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.batch import Batch, as_batch
from lightning_kd.core.fine_tuning import FineTunedTask
from lightning_kd.core.losses import at_least_float32
from lightning_kd.core.random_draws import skip_draws
from lightning_kd.core.teacher import FrozenTeacher, teacher_network
from lightning_kd.core.teacher_ensemble import TeacherEnsemble, teacher_settings
from lightning_kd.core.view_keys import VIEW
from lightning_kd.distillation.teacher_store import TeacherStore, draws_of_teacher

__all__ = ["Distillation"]


class Distillation(FineTunedTask, ABC):
    """Base of distillation methods: train a student with ``ce_weight * task loss + kd_weight * distillation_loss``.

    The task loss is that of the problem: cross-entropy for one class per image.

    Your own method is a subclass with one method::

        class Mine(Distillation):
            def distillation_loss(self, student_logits, teacher_logits, target):
                return (student_logits - teacher_logits).square().mean()

    The teacher stays in eval mode, gets no gradient, and is neither in the optimizer nor in checkpoints. Its accuracy
    is logged once, as ``val/teacher_acc``, with a warning if it is close to chance. After ``fit`` the run folder holds
    ``student.pt``, the plain student.

    With ``teacher_store`` the teacher is neither built nor run. Its logits are read from the file in which
    ``lightning-kd teach`` stored them for every view of the training images; ``val/teacher_acc`` is the value from that
    time. A training step must then use ``teacher_logits_for(batch)``; methods that use more than the teacher's logits,
    such as its features, raise an error.

    Several processes: each has a copy of the teacher; losses are means over the process's batch.

    Args:
        student: name of a network or any ``nn.Module`` that returns logits ``[B, C]``.
        teacher: name of a network or an ``nn.Module``. A module without ``teacher_weights`` counts as trained; it is
            frozen in place. Methods with ``several_teachers`` also take a list; each other argument about the teacher
            is then one value for all, or a list with one per teacher.
        num_classes: see ``Task``.
        input_shape: see ``Task``.
        teacher_weights: a checkpoint or ``state_dict`` file; ``"default"`` for the published weights of a ``timm/`` or
            ``torchvision/`` network; ``"random"`` for an untrained teacher (only to try things out).
        student_weights: checkpoint or ``state_dict`` file to start the student from; ``"default"`` for the published
            weights of a ``timm/`` or ``torchvision/`` network. Default: from scratch.
        ce_weight: weight of the task loss.
        kd_weight: weight of the distillation loss.
        teacher_mean: per-channel mean with which the teacher's images were normalised, if it differs from the data
            module's; needs ``teacher_std``.
        teacher_std: per-channel standard deviation, likewise.
        teacher_size: height and width, or one number for both, to which the teacher's images are resized (bilinear,
            antialiased). Default: the size of the data.
        teacher_store: a file that ``lightning-kd teach`` made with this teacher, data and views. ``teacher_weights``
            may then be missing; if the file exists, it must be the one that was used. Read at the start of a fit.
        kwargs: ``new_classifier``, ``freeze``, ``backbone_lr`` of ``FineTunedTask``, for the student; ``optimizer``
            (default: see ``optimizer_for``), ``lr_scheduler``, ``lr_interval``, ``channels_last``, ``compile`` of
            ``Task``.

    Raises:
        ValueError: if the teacher has no weights or another number of classes, or is the student; before a fit if its
            checkpoint names other classes than the data, or ``teacher_store`` does not fit.
    """

    #: whether the method uses more of the teacher than its logits, so that it cannot use a ``teacher_store``
    looks_into_teacher = False
    #: whether ``teacher`` may be a list, whose mean probabilities are used
    several_teachers = False
    #: whether the method uses a teacher; otherwise none is built
    needs_teacher = True
    #: a ``FrozenTeacher``, or a ``TeacherEnsemble`` for a list of teachers; ``None`` if ``needs_teacher`` is False
    teacher: Any

    def __init__(
        self,
        student: str | nn.Module,
        teacher: str | nn.Module | list[str | nn.Module],
        num_classes: int,
        *,
        input_shape: Sequence[int] = (3, 32, 32),
        teacher_weights: str | list[str | None] | None = None,
        student_weights: str | None = None,
        ce_weight: float = 1.0,
        kd_weight: float = 1.0,
        teacher_mean: Sequence[float] | Sequence[Sequence[float] | None] | None = None,
        teacher_std: Sequence[float] | Sequence[Sequence[float] | None] | None = None,
        teacher_size: int | Sequence[int | Sequence[int] | None] | None = None,
        teacher_store: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_classes, input_shape=input_shape, **kwargs)
        self.teacher_store = teacher_store
        self._store: TeacherStore | None = None
        check_numbers(least=0, ce_weight=ce_weight, kd_weight=kd_weight)
        networks = list(teacher) if isinstance(teacher, list | tuple) else [teacher]
        if isinstance(teacher, list | tuple) and not (self.several_teachers and networks):
            raise ValueError(
                f"teacher of {type(self).__name__} must be one network, got a list of {len(networks)}: name one, or "
                "take a method for several, such as MEALV2"
            )
        if isinstance(student, nn.Module) and any(student is network for network in networks):
            raise ValueError("student and teacher are one module: give the teacher its own copy")
        self.student = self.build_to_train(student, student_weights, "student_weights")
        each = teacher_settings(
            teacher,
            self.input_shape[0],
            weights=teacher_weights,
            mean=teacher_mean,
            std=teacher_std,
            size=teacher_size,
        )
        one = not isinstance(teacher, list | tuple)
        #: the given arguments; for two or more teachers each is a list
        self.teacher_arguments: dict[str, Any] = (
            each[0] if len(each) == 1 else {key: [own[key] for own in each] for key in each[0]}
        )
        self.teacher_draws: tuple[Tensor, Tensor] | None = None
        if not self.needs_teacher:
            self.teacher = None
        elif teacher_store is None:
            before = torch.get_rng_state()
            teachers = [self._build_teacher(network, own) for network, own in zip(networks, each, strict=True)]
            self.teacher = teachers[0] if one else TeacherEnsemble(teachers)
            self.teacher_draws = before, torch.get_rng_state()
        elif self.looks_into_teacher:
            self._refuse_store()
        else:
            skip_draws(draws_of_teacher(teacher_store))  # so that later modules get the same initial weights
        self.ce_weight = ce_weight
        self.kd_weight = kd_weight
        self._teacher_sums: Tensor | None = None
        self._teacher_judged = not self.needs_teacher

    def _build_teacher(self, network: str | nn.Module, own: dict[str, Any]) -> FrozenTeacher:
        size = own["size"]

        def build(network: str | nn.Module) -> nn.Module:
            return self.build(network, None if size is None else (self.input_shape[0], *size))

        return FrozenTeacher(
            teacher_network(network, own["weights"], self.num_classes, build),
            self.problem,
            mean=own["mean"],
            std=own["std"],
            size=size,
            channels_last=bool(self.channels_last),
        )

    @abstractmethod
    def distillation_loss(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
        """The method's own loss, a scalar, without the factor ``kd_weight``.

        Args:
            student_logits: float32 ``[B, C]``, with graph.
            teacher_logits: float32 ``[B, C]``, without graph.
            target: int64 ``[B]``.
        """

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch = as_batch(batch)
        student_logits, teacher_logits = at_least_float32(self(batch.image), self.teacher_logits_for(batch))
        ce = self.problem.loss(student_logits, batch.target)
        kd = self.distillation_loss(student_logits, teacher_logits, batch.target)
        return self.step_loss({"ce": self.ce_weight * ce, "kd": self.kd_weight * kd}, student_logits, batch.target)

    def modules_at_rest(self) -> list[nn.Module]:
        if self.teacher_store:
            return super().modules_at_rest()
        together = [self.teacher, self.teacher.teachers] if isinstance(self.teacher, TeacherEnsemble) else []
        return [*super().modules_at_rest(), *together, *self.teachers]

    @property
    def main_network(self) -> nn.Module:
        return self.student

    def exports(self) -> dict[str, nn.Module]:
        return {"student": self.student}

    # -- the teacher -------------------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        if name == "teacher" and self.__dict__.get("teacher_store") is not None:
            self._refuse_store()
        return super().__getattr__(name)

    def _refuse_store(self) -> NoReturn:
        raise ValueError(
            f"{type(self).__name__} looks into the teacher, of which a teacher_store holds the logits alone, got "
            f"teacher_store={self.teacher_store!r}: leave it out"
        )

    def training_indices(self, data: Any) -> np.ndarray:
        """The training samples of an epoch, int64 positions in the full training array of ``data``."""
        return getattr(data, "train_indices", np.arange(0))

    def setup(self, stage: str) -> None:
        super().setup(stage)
        data: Any = getattr(self.trainer, "datamodule", None)
        if self.teacher_store is not None:
            if stage == "fit":
                self._store = TeacherStore(self.teacher_store)
                self._store.check(data, self.teacher_arguments, self.training_indices(data))
                self._store.to(self.trainer.strategy.root_device)
            return
        for teacher in self.teachers:
            if stage in ("fit", "validate"):  # the teacher is not used in other stages
                teacher.check_classes(data)
            if teacher.mean is not None:
                if not hasattr(data, "mean") or not hasattr(data, "std"):
                    raise ValueError("teacher_mean needs a data module with mean and std, to undo its normalisation")
                teacher.set_data_normalisation(data.mean, data.std)

    @property
    def teachers(self) -> list[FrozenTeacher]:
        """All teachers, one or more; an empty list if ``needs_teacher`` is False."""
        several = isinstance(self.teacher, TeacherEnsemble)
        return list(self.teacher.teachers) if several else [t for t in (self.teacher,) if t is not None]

    def teacher_logits_for(self, batch: Batch) -> Tensor:
        """The teacher's logits ``[B, C]`` for a training batch, without gradient.

        They come from the ``teacher_store`` if there is one, else from a forward pass. To be used in ``training_step``.

        Raises:
            ValueError: if there is a store and the batch does not say which views its images are.
        """
        if self._store is None:
            return self.teacher_logits(batch.image)
        if batch.index is None or VIEW not in batch.extras:
            raise ValueError(
                f"teacher_store needs batches that tell their views, got extras {sorted(batch.extras)}: let "
                "train_loader give data.loader the options of self.view_options(), or leave teacher_store out"
            )
        return self._store.logits(batch.index, batch.extras[VIEW])

    def view_options(self) -> dict[str, Any]:
        keys = {} if self._store is None else {"view_keys": self._store.view_keys}
        return super().view_options() | keys

    def teacher_logits(self, image: Tensor) -> Tensor:
        """The teacher's logits ``[B, C]``, without gradient; for several the logarithm of their mean probabilities."""
        return self.teacher(image)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        if self.teacher_store is None and not self._teacher_judged and not self.trainer.sanity_checking:
            batch = as_batch(batch)
            values, counted = self.problem.training_values(self.teacher_logits(batch.image), batch.target)
            counted = torch.ones_like(values, dtype=torch.bool) if counted is None else counted
            sums = torch.stack([(values * counted).sum().float(), counted.sum().float()])
            self._teacher_sums = sums if self._teacher_sums is None else self._teacher_sums + sums

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        if self._teacher_judged or self.trainer.sanity_checking:
            return
        if self.teacher_store is not None:
            reached = {} if self._store is None else self._store.reached
            if self.problem.training_metric in reached:
                self._log_teacher_metric(reached[self.problem.training_metric])
            return
        # even without a batch on this process, since the others wait for it
        sums = torch.zeros(2, device=self.device) if self._teacher_sums is None else self._teacher_sums
        total, count = self.trainer.strategy.reduce(sums, reduce_op="sum").tolist()
        self._teacher_sums = None
        if count:
            self._log_teacher_metric(total / count)

    def _log_teacher_metric(self, reached: float) -> None:
        self._teacher_judged = True
        name, chance = self.problem.training_metric, self.problem.chance
        self.log(f"val/teacher_{name}", reached)
        if chance is not None and reached < min(2 * chance, (1 + chance) / 2):
            rank_zero_warn(
                f"the teacher's validation accuracy is {reached:.1%}, chance is {chance:.1%}: check "
                "teacher_weights, the class order and the normalisation (teacher_mean, teacher_std)"
            )

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["teacher_judged"] = self._teacher_judged

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._teacher_judged = checkpoint.get("teacher_judged", False)
