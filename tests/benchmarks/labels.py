"""The benches of several labels an image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from measure import Clock, Settings, Variant, compare
from torch import Tensor

from lightning_kd.distillation import class_aware_loss, instance_aware_loss


def scaled_distances(points: Tensor) -> Tensor:
    """Distances between the rows of ``points``, divided by the mean of those above 0."""
    product = points @ points.T
    squares = product.diagonal()
    apart = (squares[:, None] + squares[None] - 2 * product).clamp(min=1e-12).sqrt()
    apart = apart * (1 - torch.eye(len(points)))
    return apart / apart[apart > 0].mean()


def plain_relation(student: Tensor, teacher: Tensor) -> Tensor:
    """The relation loss of one class, or of one image."""
    with torch.no_grad():
        target = scaled_distances(teacher)
    return F.smooth_l1_loss(scaled_distances(student), target, reduction="sum") / len(student)


def relations(settings: Settings) -> None:
    """Both losses of L2D on embeddings, forward and backward: batch 64, 80 labels, 3 an image, 768 values."""
    batch, classes, width = 64, 80, 768
    generator = torch.Generator().manual_seed(0)
    share = torch.linspace(0, -4, classes).exp()  # the most frequent label is as frequent as in COCO
    share = (3.2 * share / share.sum()).clamp(max=0.45)
    target = (torch.rand(batch, classes, generator=generator) < share).float()
    student, teacher = (torch.randn(batch, classes, width, generator=generator) for _ in range(2))
    student.requires_grad_()

    def loop() -> Tensor:
        total = torch.zeros(())
        for k in range(classes):
            there = target[:, k] > 0
            if there.sum() > 1:
                total = total + plain_relation(student[there, k], teacher[there, k])
        for i in range(batch):
            there = target[i] > 0
            if there.sum() > 1:
                total = total + plain_relation(student[i, there], teacher[i, there])
        return total

    def ours() -> Tensor:
        return class_aware_loss(student, teacher, target) + instance_aware_loss(student, teacher, target)

    torch.testing.assert_close(loop(), ours(), rtol=1e-3, atol=1e-4)
    times = settings.size(5, 2)

    def turn(loss: object) -> float:
        with Clock() as clock:
            for _ in range(times):
                student.grad = None
                loss().backward()  # type: ignore[operator]
        return clock.seconds / times

    variants = [
        Variant("a loop over classes and images", lambda: turn(loop)),
        Variant("class_aware_loss, instance_aware_loss", lambda: turn(ours), ">= 10"),
    ]
    compare(f"relations: L2D, batch {batch}, {classes} labels of {width}", variants, settings.rounds)
