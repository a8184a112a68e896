"""KD++: add a loss on the norm and direction of the pooled feature to a known distillation method.

Yuzhu Wang, Lechao Cheng, Manni Duan, Yongheng Wang, Zunlei Feng, Shu Kong. Improving Knowledge Distillation via
Regularizing Feature Norm and Direction. arXiv 2305.17007.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_kd.argument_checks import check_numbers, naming_argument
from lightning_kd.core.batch import as_batch
from lightning_kd.core.distributed import summed
from lightning_kd.core.feature_hooks import penultimate_tap
from lightning_kd.core.inference_pass import evaluating
from lightning_kd.core.losses import at_least_float32, check_shapes, check_target
from lightning_kd.core.random_state import same_random_state
from lightning_kd.core.stage_features import StageFeatures
from lightning_kd.distillation._published_weights import PublishedWeights, published_weights
from lightning_kd.distillation.dist import dist_loss
from lightning_kd.distillation.distillation_task import Distillation
from lightning_kd.distillation.dkd import dkd_loss
from lightning_kd.distillation.kd import kd_loss
from lightning_kd.distillation.reviewkd import ReviewKDLoss

__all__ = ["KDPlusPlus", "PublishedWeights", "norm_direction_loss", "published_weights"]

BASES = ("kd", "dkd", "dist", "reviewkd")
FLOOR = 1e-12


def norm_direction_loss(student_feature: Tensor, teacher_feature: Tensor, class_mean: Tensor, target: Tensor) -> Tensor:
    """``1 - <s, e> / max(|s|, |t|)``, mean over the batch, with ``e`` the direction of the class's mean feature.

    ``s`` and ``t`` are the features of student and teacher. The loss lies in [0, 2]. While the student's feature is
    shorter than the teacher's, the gradient is ``-e / (N |t|)``: the feature grows along ``e``. Once it is as long, the
    loss is 1 minus the cosine and changes only its direction.

    Args:
        student_feature: ``[N, D]``; half precision is computed in float32, float64 stays.
        teacher_feature: ``[N, D]``, of the same images; gets no gradient.
        class_mean: ``[C, D]``, mean of the teacher's features of each class; only its direction matters. Gets no
            gradient.
        target: int64 ``[N]``.

    Returns:
        Scalar.

    Raises:
        ValueError: if the shapes do not match, or the target has a wrong shape or dtype or is out of range (checked on
            a CPU only).

    Source: arXiv 2305.17007, the ND loss as in the official code.
    """
    check_shapes(
        student_feature=(student_feature, "ND"), teacher_feature=(teacher_feature, "ND"), class_mean=(class_mean, "CD")
    )
    if len(class_mean) < 2:
        raise ValueError(f"class_mean must be [C, D] of 2 classes or more, got {list(class_mean.shape)}: give all")
    check_target(student_feature[:, :1].expand(-1, len(class_mean)), target)
    student, teacher, mean = at_least_float32(student_feature, teacher_feature.detach(), class_mean.detach())
    direction = F.normalize(mean)[target]
    own, other = (torch.linalg.vector_norm(feature, dim=1) for feature in (student, teacher))
    length = torch.where(own >= other, own, other).clamp(min=FLOOR)
    return (1 - (student * direction).sum(1) / length).mean()


class KDPlusPlus(Distillation):
    """KD++ (Wang et al., 2023, arXiv 2305.17007): distillation plus a loss on norm and direction of the feature.

    The pooled feature of the student should point in the direction of its class, the mean of the teacher's features of
    this class, and be as long as the teacher's. This loss, ``ND``, is added to a known distillation method, the base.

    The loss is ``ce_weight * CE + kd_weight * min(1, epoch / warmup_epochs) * BASE + nd_weight * ND``, epochs counted
    from 0, so that the first epoch has no ``BASE``. ``ND`` is ``norm_direction_loss`` of the pooled features. If the
    student's feature differs in length from the teacher's, it first passes batch norm, dropout 0.5 and a linear layer,
    which are used only for this loss.

    Before training, the teacher runs once over all training samples to compute the mean feature of each class.
    Checkpoints hold the means and a fingerprint of the teacher. Without a data module of this package they are means
    over the images that the ``DataLoader`` yields.

    Several processes: the means are over the samples of all processes, each counted once (except those that the
    Trainer's own sampler repeats to fill the last batch); losses are means over the process's batch.

    Args:
        student: see ``Distillation``; it needs a linear classifier, whose input is the pooled feature.
        teacher: see ``Distillation``; it needs a linear classifier too.
        num_classes: see ``Task``.
        base: ``"kd"`` (KD++), ``"dkd"`` (DKD++), ``"dist"`` (DIST++, both relations with equal weights) or
            ``"reviewkd"`` (ReviewKD++, with training-only fusion blocks on the stages of both networks).
        ce_weight: weight of the cross-entropy. Default: that of the paper for the pair of names, see
            ``published_weights``.
        kd_weight: weight of the base. Default: that of the paper, too.
        nd_weight: weight of ``ND``. Default: that of the paper, too.
        alpha: weight of the target-class part of DKD. Default: that of the paper, too.
        beta: weight of the non-target-class part of DKD. Default: that of the paper, too.
        temperature: temperature of the base: 4 on CIFAR, 1 on ImageNet.
        warmup_epochs: epochs in which the weight of the base rises: 20 on CIFAR, 5 on ImageNet.
        augmented_means: compute the means from augmented images, as the official code does.
        classifier: module path of the student's classifier. Default: its last ``nn.Linear``.
        teacher_classifier: module path of the teacher's classifier. Default: its last ``nn.Linear``.
        student_stages: for ``"reviewkd"``, module paths of the student's stages. Default: found, see ``StageFeatures``.
        teacher_stages: for ``"reviewkd"``, module paths of the teacher's stages. Default: found likewise.
        kwargs: the further arguments of ``Distillation`` and ``Task``.

    Raises:
        ValueError: if an argument is out of range; in a fit, if a class has no training sample, or a resumed run has
            another teacher.
    """

    looks_into_teacher = True

    class_mean: Tensor
    class_mean_teacher: Tensor

    def __init__(
        self,
        student: str | nn.Module,
        teacher: str | nn.Module,
        num_classes: int,
        *,
        base: Literal["kd", "dkd", "dist", "reviewkd"] = "kd",
        ce_weight: float | None = None,
        kd_weight: float | None = None,
        nd_weight: float | None = None,
        alpha: float | None = None,
        beta: float | None = None,
        temperature: float = 4.0,
        warmup_epochs: int = 20,
        augmented_means: bool = False,
        classifier: str | None = None,
        teacher_classifier: str | None = None,
        student_stages: Sequence[str] | None = None,
        teacher_stages: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        if base not in BASES:
            raise ValueError(f"base must be one of {', '.join(BASES)}, got {base!r}: give one of them")
        given = {"ce": ce_weight, "kd": kd_weight, "nd": nd_weight, "alpha": alpha, "beta": beta}
        check_numbers(
            {k if k in ("alpha", "beta") else f"{k}_weight": v for k, v in given.items()}, least=0, optional=True
        )
        weights = published_weights(student, teacher, base)._replace(
            **{k: v for k, v in given.items() if v is not None}
        )
        super().__init__(student, teacher, num_classes, ce_weight=weights.ce, kd_weight=weights.kd, **kwargs)
        check_numbers(above=0, temperature=temperature)
        check_numbers(least=0, whole=True, warmup_epochs=warmup_epochs)
        self.base, self.temperature, self.warmup_epochs = base, temperature, warmup_epochs
        self.nd_weight, self.alpha, self.beta = weights.nd, weights.alpha, weights.beta
        self.augmented_means = augmented_means
        self._student_feature, linear = penultimate_tap(self.student, classifier)
        with naming_argument("teacher_classifier"):
            self._teacher_feature, teacher_linear = penultimate_tap(self.teacher.network, teacher_classifier)
        length, own = teacher_linear.in_features, linear.in_features
        self.adapter = nn.Identity() if own == length else _adapter(own, length)
        self.review: ReviewKDLoss | None = None
        if base == "reviewkd":
            size = self.teacher.size
            shape = self.input_shape if size is None else (self.input_shape[0], *size)
            with naming_argument("student_stages"):
                self._student_stages = StageFeatures(self.student, self.input_shape, student_stages)
            with naming_argument("teacher_stages"):
                self._teacher_stages = StageFeatures(self.teacher.network, shape, teacher_stages, before=True)
            self.review = ReviewKDLoss(self._student_stages.shapes, self._teacher_stages.shapes)
            if self.channels_last:
                self.review.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.register_buffer("class_mean", torch.zeros(num_classes, length))
        self.keep_precise("class_mean")
        self.register_buffer("class_mean_teacher", torch.zeros(32, dtype=torch.uint8))  # all 0: there are no means

    # -- the means ---------------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        super().on_train_start()
        own = torch.frombuffer(bytearray(self.teacher.fingerprint()), dtype=torch.uint8).to(self.device)
        if self.trainer.ckpt_path is not None and bool(self.class_mean_teacher.any()):
            if not torch.equal(own, self.class_mean_teacher):
                raise ValueError(
                    "the class means in the checkpoint are of another teacher than this one: give the teacher and "
                    "teacher_weights that the run was started with"
                )
            return
        self.class_mean.copy_(self.class_means())
        self.class_mean_teacher.copy_(own)

    def class_means(self) -> Tensor:
        """The mean of the teacher's features of each class, float64 ``[C, D]``, from a pass over the training set.

        All processes must call it together.

        Raises:
            ValueError: if a class has no training sample.
        """
        data: Any = getattr(self.trainer, "datamodule", None)
        view = "weak" if self.augmented_means else "plain"
        ours = hasattr(data, "loader") and hasattr(data, "train_indices")
        loader: Any = data.loader("train", views=view) if ours else self.trainer.train_dataloader
        sums = torch.zeros(self.class_mean.shape, dtype=torch.float64)
        counts = torch.zeros(len(sums), dtype=torch.float64)
        strategy, precision = self.trainer.strategy, self.trainer.precision_plugin
        with evaluating(self), same_random_state(self.device):
            for batch in loader:
                image, target, *_ = as_batch(precision.convert_input(strategy.batch_to_device(batch)))
                check_target(self.teacher_logits(image), target)
                target = target.cpu()
                sums.index_add_(0, target, self._teacher_feature.pop().double().cpu())
                counts += target.bincount(minlength=len(sums))
        total = summed(torch.cat([sums, counts[:, None]], 1).to(self.device)).cpu()
        sums, counts = total[:, :-1], total[:, -1]
        empty = (counts == 0).nonzero().flatten().tolist()
        if empty:
            names = getattr(data, "class_names", range(len(sums)))
            raise ValueError(
                f"class {names[empty[0]]!r} has no training sample, so that there is no mean of the teacher's features "
                f"({len(empty)} of {len(sums)} classes have none): give each class at least one"
            )
        return sums / counts[:, None]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        stored = checkpoint["state_dict"].get("class_mean")
        if stored is not None and stored.shape != self.class_mean.shape:
            raise ValueError(
                f"the checkpoint has class means {list(stored.shape)}, of another teacher than this one with "
                f"{list(self.class_mean.shape)}: give the teacher that the run was started with"
            )

    # -- the loss ----------------------------------------------------------------------------------------------------

    def distillation_loss(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
        """The loss of the base, without its warm-up."""
        if self.review is not None:
            return self.review(self._student_stages.pop(), self._teacher_stages.pop())
        if self.base == "dkd":
            return dkd_loss(student_logits, teacher_logits, target, self.alpha, self.beta, self.temperature)
        if self.base == "dist":
            return dist_loss(student_logits, teacher_logits, 1.0, 1.0, self.temperature)
        return kd_loss(student_logits, teacher_logits, self.temperature)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch = as_batch(batch)
        if len(batch.target) < 2 and (self.review is not None or not isinstance(self.adapter, nn.Identity)):
            raise ValueError(
                "a batch of 1 has no statistics for what is trained beside the student: choose a batch_size that does "
                "not leave one over, or drop_last"
            )
        logits, teacher_logits = at_least_float32(self(batch.image), self.teacher_logits(batch.image))
        warmup = min(1.0, self.current_epoch / self.warmup_epochs) if self.warmup_epochs else 1.0
        ce = self.problem.loss(logits, batch.target)
        kd = self.distillation_loss(logits, teacher_logits, batch.target)
        feature = self.adapter(self._student_feature.pop())
        nd = norm_direction_loss(feature, self._teacher_feature.pop(), self.class_mean, batch.target)
        terms = {"ce": self.ce_weight * ce, "kd": self.kd_weight * warmup * kd, "nd": self.nd_weight * nd}
        return self.step_loss(terms, logits, batch.target)


def _adapter(student: int, teacher: int) -> nn.Module:
    linear = nn.Linear(student, teacher)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.BatchNorm1d(student), nn.Dropout(0.5), linear)
