"""Dual-head knowledge distillation.

Penghui Yang, Chen-Chen Zong, Sheng-Jun Huang, Lei Feng, Bo An. Dual-Head Knowledge Distillation: Enhancing Logits
Utilization with an Auxiliary Head. KDD 2025, arXiv 2411.08937.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.batch import as_batch
from lightning_kd.core.distributed import process_count
from lightning_kd.core.feature_hooks import penultimate_tap
from lightning_kd.core.losses import at_least_float32, bernoulli_kl, check_logits, check_positive
from lightning_kd.distillation.distillation_task import Distillation
from lightning_kd.distillation.kd import kd_loss

__all__ = ["DHKD", "align_gradients", "binary_kl_loss", "binary_kl_norm_loss"]

Gradients = Sequence[Tensor | None]


def binary_kl_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """KL divergence per class as Bernoulli variables: ``temperature^2 * sum_k KL(Bern(q_teacher) || Bern(q_student))``.

    ``q = sigmoid(logits / temperature)``. It is a sum over classes and a mean over the batch: with more classes use a
    smaller weight. Gradient: ``temperature / B * (q_student - q_teacher)``.

    Args:
        student_logits: ``[B, C]``; half precision is computed in float32, float64 stays.
        teacher_logits: ``[B, C]``; gets no gradient.
        temperature: above 0.

    Returns:
        Scalar.

    Raises:
        ValueError: if the logits differ in shape, or ``temperature`` is not above 0.

    Source: arXiv 2411.08937, the BinaryKL loss.
    """
    check_logits(student_logits, teacher_logits)
    check_positive(temperature=temperature)
    student, teacher = (z / temperature for z in at_least_float32(student_logits, teacher_logits.detach()))
    return temperature**2 * bernoulli_kl(student, teacher).sum(1).mean()


def binary_kl_norm_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """BinaryKL-Norm: pull the sigmoid of the logit difference to 1/2: ``temperature^2 * sum_k log cosh(d_k / 2)``.

    ``d = (student - teacher) / temperature``, and ``log cosh(d / 2) = KL(Bern(1/2) || Bern(sigmoid(d)))``. It is a sum
    over classes and a mean over the batch. Small differences count ``(student - teacher)^2 / 8`` at any temperature,
    large ones count linearly. Gradient: ``temperature / (2 B) * tanh(d / 2)``.

    Args:
        student_logits: ``[B, C]``; half precision is computed in float32, float64 stays.
        teacher_logits: ``[B, C]``; gets no gradient.
        temperature: above 0.

    Returns:
        Scalar.

    Raises:
        ValueError: if the logits differ in shape, or ``temperature`` is not above 0.

    Source: arXiv 2411.08937, the BinaryKL-Norm loss.
    """
    check_logits(student_logits, teacher_logits)
    check_positive(temperature=temperature)
    student_logits, teacher_logits = at_least_float32(student_logits, teacher_logits.detach())
    return temperature**2 * _log_cosh((student_logits - teacher_logits) / (2 * temperature)).sum(1).mean()


def _log_cosh(x: Tensor) -> Tensor:
    """``log cosh(x)``: exact to rounding near 0, where ``|x| - log 2`` cancels, and finite for large ``x``."""
    near = torch.log1p(2 * (x.clamp(-1, 1) / 2).sinh().square())
    far = x.abs() + torch.log1p((-2 * x.abs()).exp()) - math.log(2)
    return torch.where(x.abs() < 1, near, far)


def align_gradients(
    primary: Gradients, auxiliary: Gradients, shared: Sequence[bool] | None = None
) -> list[Tensor | None]:
    """Sum of two gradients, after removing from ``auxiliary`` the part that works against ``primary``.

    With ``s = <primary, auxiliary>`` over all tensors as one vector: if ``s < 0``, ``auxiliary`` is replaced by
    ``auxiliary - s / |primary|^2 * primary``. No tensor is flattened or changed in place, and nothing is copied to the
    CPU.

    Args:
        primary: gradients of the main objective, one per parameter; ``None`` if a parameter has none.
        auxiliary: gradients of the other objective, in the same order.
        shared: for each parameter whether it is part of the projection. Default: all, as in the official code; a
            parameter with only a ``primary`` gradient, such as the main head's, then gets it scaled by
            ``1 + |s| / |primary|^2``.

    Returns:
        The sums; ``None`` where both are ``None``.

    Raises:
        ValueError: if the lengths differ, or the shapes of the two gradients of a parameter.

    Source: arXiv 2411.08937, gradient alignment.
    """
    mask = [True] * len(primary) if shared is None else [bool(flag) for flag in shared]
    if not len(primary) == len(auxiliary) == len(mask):
        raise ValueError(
            f"primary, auxiliary and shared must be of one length, got {len(primary)}, {len(auxiliary)}, {len(mask)}"
        )
    for k, (p, a) in enumerate(zip(primary, auxiliary, strict=True)):
        if p is not None and a is not None and p.shape != a.shape:
            shapes = f"{list(p.shape)} and {list(a.shape)}"
            raise ValueError(f"primary and auxiliary must be of the same parameters, got shapes {shapes} at {k}")
    dot, primary_square, _ = _products(primary, auxiliary, mask)
    coefficient = torch.where((dot < 0) & (primary_square > 0), -dot / primary_square, torch.zeros_like(dot))
    merged: list[Tensor | None] = []
    for p, a, takes_part in zip(primary, auxiliary, mask, strict=True):
        if p is None:
            merged.append(a)
        else:
            total = p if a is None else p + a
            merged.append(total.addcmul(p, coefficient.to(p.dtype)) if takes_part else total)
    return merged


def _products(primary: Gradients, auxiliary: Gradients, mask: Sequence[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """``<primary, auxiliary>``, ``|primary|^2`` and ``|auxiliary|^2`` over the masked tensors, as 0-d tensors."""
    kept = [(p, a) for p, a, flag in zip(primary, auxiliary, mask, strict=True) if flag]
    example = next((t for pair in kept for t in pair if t is not None), torch.zeros(()))
    dtype = torch.float64 if example.dtype == torch.float64 else torch.float32
    zero = [torch.zeros((), dtype=dtype, device=example.device)]
    dot = [(p * a).sum(dtype=dtype) for p, a in kept if p is not None and a is not None]
    first = [p.square().sum(dtype=dtype) for p, _ in kept if p is not None]
    second = [a.square().sum(dtype=dtype) for _, a in kept if a is not None]
    dot_sum, first_sum, second_sum = (torch.stack(zero + terms).sum() for terms in (dot, first, second))
    return dot_sum, first_sum, second_sum


class DHKD(Distillation):
    """Dual-head knowledge distillation (Yang et al., KDD 2025, arXiv 2411.08937): one student head for each loss.

    Cross-entropy and distillation on logits can pull the student's classifier in different directions. So the student
    gets a second head on its pooled feature, used only in training: cross-entropy trains the main head, the
    distillation loss the auxiliary head, and the backbone gets both gradients. ``heads=1`` puts both losses on the main
    head, as an ablation.

    With gradient alignment the conflicting part of the distillation gradient is removed (``align_gradients``), and
    ``train/cosine`` is the mean cosine between both gradients over their shared parameters. It needs two backward
    passes per step. Both gradients are averaged over processes, and summed over accumulated batches, before they are
    aligned; the gradient scaling of 16-mixed does not affect the projection.

    Args:
        student: see ``Distillation``; with two heads it needs a linear classifier.
        teacher: see ``Distillation``.
        num_classes: see ``Task``.
        loss: ``"binary_kl_norm"`` (the method), ``"binary_kl"`` or ``"kd"`` (softmax).
        temperature: temperature of the loss; in the paper 2 for the binary losses, 4 for ``"kd"``.
        heads: 2, or 1 for the ablation.
        auxiliary_head: ``"linear"`` if the teacher is of the student's family, else ``"nonlinear"`` (linear to 200,
            dropout 0.1, batch norm, ReLU, linear).
        gradient_alignment: ``"off"``; ``"all"``: over all parameters, as in the official code; ``"shared"``: over the
            parameters that both losses reach.
        stop_epoch: epoch, counted from 1, from which only cross-entropy is used (50 on ImageNet). Default: never.
        classifier: module path of the student's classifier. Default: its last ``nn.Linear``.
        ce_weight: weight of the cross-entropy (gamma in the paper).
        kd_weight: weight of the distillation loss (alpha in the paper), which is a sum over classes: 1 with 100
            classes, 0.1 with 1,000.
        kwargs: the further arguments of ``Distillation`` and ``Task``.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        student: str | nn.Module,
        teacher: str | nn.Module,
        num_classes: int,
        *,
        loss: Literal["binary_kl_norm", "binary_kl", "kd"] = "binary_kl_norm",
        temperature: float = 2.0,
        heads: Literal[1, 2] = 2,
        auxiliary_head: Literal["linear", "nonlinear"] = "linear",
        gradient_alignment: Literal["off", "all", "shared"] = "off",
        stop_epoch: int | None = None,
        classifier: str | None = None,
        ce_weight: float = 1.0,
        kd_weight: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(student, teacher, num_classes, ce_weight=ce_weight, kd_weight=kd_weight, **kwargs)
        check_numbers(above=0, temperature=temperature)
        check_numbers(least=1, whole=True, optional=True, stop_epoch=stop_epoch)
        for name, value, known in (
            ("loss", loss, ("binary_kl_norm", "binary_kl", "kd")),
            ("heads", heads, (1, 2)),
            ("auxiliary_head", auxiliary_head, ("linear", "nonlinear")),
            ("gradient_alignment", gradient_alignment, ("off", "all", "shared")),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(str, known))}, got {value!r}")
        self.loss, self.temperature, self.heads = loss, temperature, heads
        self.gradient_alignment, self.stop_epoch = gradient_alignment, stop_epoch
        self.auxiliary_head: nn.Module | None = None
        if heads == 2:
            self._feature, linear = penultimate_tap(self.student, classifier)
            self.auxiliary_head = _auxiliary_head(auxiliary_head, linear.in_features, num_classes)
        self._objectives: tuple[Tensor, Tensor] | None = None
        self._accumulated: tuple[list[Tensor | None], list[Tensor | None]] | None = None

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if self.compile_networks and self.gradient_alignment != "off":
            # two backward passes over one compiled graph: the first must not free its buffers
            torch._functorch.config.donated_buffer = False

    def distillation_loss(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
        function = {"binary_kl_norm": binary_kl_norm_loss, "binary_kl": binary_kl_loss, "kd": kd_loss}[self.loss]
        return function(student_logits, teacher_logits, self.temperature)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch = as_batch(batch)
        logits = self(batch.image)
        head_logits = logits if self.auxiliary_head is None else self.auxiliary_head(self._feature.pop())
        logits, head_logits = at_least_float32(logits, head_logits)
        ce = self.ce_weight * self.problem.loss(logits, batch.target)
        if self.stop_epoch is not None and self.current_epoch + 1 >= self.stop_epoch:
            # DDP waits for every parameter, so the unused head gets a gradient of 0
            self._objectives = None
            return self.step_loss({"ce": ce}, logits, batch.target) + 0.0 * head_logits.sum()
        (teacher_logits,) = at_least_float32(self.teacher_logits_for(batch))
        kd = self.kd_weight * self.distillation_loss(head_logits, teacher_logits, batch.target)
        self._objectives = (ce, kd) if self.gradient_alignment != "off" else None
        return self.step_loss({"ce": ce, "kd": kd}, logits, batch.target)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if self._objectives is None:
            super().backward(loss, *args, **kwargs)
            return
        parameters = [p for p in self.parameters() if p.requires_grad]
        # the loss is scaled (accumulation, 16-mixed); its derivatives by the two objectives are that scale
        scales = torch.autograd.grad(loss, self._objectives, retain_graph=True)
        known = sum(scale * part.detach() for scale, part in zip(scales, self._objectives, strict=True))
        if loss.device.type == "cpu" and not torch.allclose(loss.detach(), torch.as_tensor(known), equal_nan=True):
            raise RuntimeError(
                "gradient_alignment aligns cross-entropy and distillation loss alone, and the loss has further terms: "
                "add them inside distillation_loss, or set gradient_alignment off"
            )
        both: list[list[Tensor | None]] = []
        for objective, scale, keep in zip(self._objectives, scales, (True, False), strict=True):
            grads = torch.autograd.grad(objective, parameters, scale, retain_graph=keep, allow_unused=True)
            both.append(self._mean_over_processes(grads))
        self._objectives = None
        if all(p.grad is None for p in parameters):  # gradients were cleared: a new step begins
            self._accumulated = None
        if self._accumulated is not None:
            both = [list(map(_add, old, new)) for old, new in zip(self._accumulated, both, strict=True)]
        if self.trainer.accumulate_grad_batches > 1:
            self._accumulated = (both[0], both[1])
        reached = [p is not None and a is not None for p, a in zip(*both, strict=True)]
        merged = align_gradients(both[0], both[1], reached if self.gradient_alignment == "shared" else None)
        dot, first, second = _products(both[0], both[1], reached)
        cosine = dot / (first * second).sqrt().clamp_min(1e-20)
        self.accumulate(("cosine",), cosine.nan_to_num(0.0)[None], 1)  # NaN in steps that 16-mixed skips
        for parameter, gradient in zip(parameters, merged, strict=True):
            parameter.grad = gradient

    @staticmethod
    def _mean_over_processes(grads: Gradients) -> list[Tensor | None]:
        if process_count() > 1:
            for grad in grads:
                if grad is not None:
                    dist.all_reduce(grad)
                    grad /= process_count()
        return list(grads)


def _add(x: Tensor | None, y: Tensor | None) -> Tensor | None:
    return y if x is None else x if y is None else x + y


def _auxiliary_head(kind: str, in_features: int, num_classes: int) -> nn.Module:
    if kind == "linear":
        return nn.Linear(in_features, num_classes)
    hidden = 200  # the same for every network
    return nn.Sequential(
        nn.Linear(in_features, hidden),
        nn.Dropout(0.1),
        nn.BatchNorm1d(hidden),
        nn.ReLU(),
        nn.Linear(hidden, num_classes),
    )
