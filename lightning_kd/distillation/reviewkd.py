"""ReviewKD: student features, fused from deep to shallow stages, learn the teacher's features of each stage.

Pengguang Chen, Shu Liu, Hengshuang Zhao, Jiaya Jia. Distilling Knowledge via Knowledge Review. CVPR 2021, arXiv
2104.09044.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.losses import at_least_float32
from lightning_kd.core.stage_features import StageMaps, StageShapes
from lightning_kd.distillation.feature_distillation import FeatureDistillation

__all__ = ["ReviewKD", "ReviewKDLoss", "hierarchical_context_loss"]

MOST_CHANNELS = 512


def hierarchical_context_loss(student_map: Tensor, teacher_map: Tensor) -> Tensor:
    """Mean squared error between two maps at several scales: full size, and average-pooled to 4x4, 2x2 and 1x1.

    The result is a weighted mean: the full map has weight 1, each further scale half the weight of the one before.
    Scales that are not smaller than the map are left out.

    Args:
        student_map: ``[N, C, H, W]``; half precision is computed in float32, float64 stays.
        teacher_map: ``[N, C, H, W]``; gets no gradient.

    Returns:
        Scalar.

    Raises:
        ValueError: if the maps differ in shape.

    Source: arXiv 2104.09044, section 3.3 (hierarchical context loss), with the weights of the official code.
    """
    if student_map.ndim != 4 or student_map.shape != teacher_map.shape:
        raise ValueError(
            f"student_map {list(student_map.shape)} and teacher_map {list(teacher_map.shape)} must both be "
            "[N, C, H, W]: fuse the student's first"
        )
    student, teacher = at_least_float32(student_map, teacher_map.detach())
    loss, weight, total = F.mse_loss(student, teacher), 1.0, 1.0
    for side in (4, 2, 1):
        if side < student.shape[2]:
            weight /= 2
            total += weight
            small = [F.adaptive_avg_pool2d(m, side) for m in (student, teacher)]
            loss = loss + weight * F.mse_loss(small[0], small[1])
    return loss / total


class _Fusion(nn.Module):
    """One level: fuse a student map with the deeper level by learnt attention, and bring it to the teacher's shape."""

    def __init__(self, in_channels: int, middle: int, out_channels: int, deepest: bool) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(in_channels, middle, 1, bias=False), nn.BatchNorm2d(middle))
        self.conv2 = nn.Sequential(
            nn.Conv2d(middle, out_channels, 3, padding=1, bias=False), nn.BatchNorm2d(out_channels)
        )
        self.att_conv = None if deepest else nn.Sequential(nn.Conv2d(2 * middle, 2, 1), nn.Sigmoid())
        for convolution in (self.conv1[0], self.conv2[0]):
            assert isinstance(convolution, nn.Conv2d)
            nn.init.kaiming_uniform_(convolution.weight, a=1)

    def forward(self, x: Tensor, deeper: Tensor | None, size: torch.Size) -> tuple[Tensor, Tensor]:
        """The map to compare with the teacher's, and the fused map for the next level."""
        x = self.conv1(x)
        if self.att_conv is not None and deeper is not None:
            deeper = F.interpolate(deeper, x.shape[2:], mode="nearest")
            share = self.att_conv(torch.cat([x, deeper], 1))
            x = x * share[:, :1] + deeper * share[:, 1:]
        if x.shape[2:] != size:
            x = F.interpolate(x, tuple(size), mode="nearest")
        return self.conv2(x), x


class ReviewKDLoss(nn.Module):
    """The loss of ReviewKD with its fusion blocks, which are trained with the student and used only in training.

    It goes from deep to shallow and starts with the pooled feature as a 1x1 map. At each level the student's map is
    fused with the result of the deeper level, and compared by ``hierarchical_context_loss`` with the teacher's map
    before its last activation.

    Args:
        student: shapes of the student's maps, see ``StageFeatures``.
        teacher: shapes of the teacher's maps, including ``before``.
        student_preact: use the student's maps before their last activation, not after it.

    Raises:
        ValueError: if the numbers of stages differ, or a network has no pooled feature.
    """

    def __init__(self, student: StageShapes, teacher: StageShapes, student_preact: bool = False) -> None:
        super().__init__()
        if student.pooled is None or teacher.pooled is None:
            raise ValueError(
                "ReviewKD needs the pooled features of both networks, got one without a linear classifier: take another"
            )
        self.student_preact = student_preact
        maps = student.before if student_preact else student.maps
        ins, outs = (
            [shape[0] for shape in (*some, last)]
            for some, last in ((maps, student.pooled), (teacher.before, teacher.pooled))
        )
        if len(ins) != len(outs):
            raise ValueError(f"student and teacher must have as many maps, got {len(ins)} and {len(outs)}")
        middle = min(MOST_CHANNELS, ins[-1])
        levels = list(zip(ins, outs, strict=True))
        fusions = [_Fusion(i, middle, o, deepest=k == len(levels) - 1) for k, (i, o) in enumerate(levels)]
        self.fusions = nn.ModuleList(fusions[::-1])

    def forward(self, student: StageMaps, teacher: StageMaps) -> Tensor:
        """The sum of the losses of all levels, a scalar."""
        assert student.pooled is not None
        assert teacher.pooled is not None
        maps = student.before if self.student_preact else student.maps
        sources = [*maps, student.pooled[:, :, None, None]]
        targets = [*teacher.before, teacher.pooled[:, :, None, None]]
        losses: list[Tensor] = []
        fused: Tensor | None = None
        for fusion, source, wanted in zip(self.fusions, sources[::-1], targets[::-1], strict=True):
            out, fused = fusion(source, fused, wanted.shape[2:])
            losses.append(hierarchical_context_loss(out, wanted))
        return torch.stack(losses).sum()


class ReviewKD(FeatureDistillation):
    """ReviewKD (Chen et al., CVPR 2021, arXiv 2104.09044): learn the teacher's features across stages.

    A deep stage of the student can also learn from shallow stages of the teacher. For this the student's features are
    fused from deep to shallow; the fused feature of each level is compared with the teacher's feature of that level
    (see ``ReviewKDLoss``).

    Args:
        student: see ``Distillation``.
        teacher: see ``Distillation``.
        num_classes: see ``Task``.
        warmup_epochs: the distillation loss is multiplied by ``min(epoch / warmup_epochs, 1)``, epochs counted from 1.
            20 on CIFAR, 1 on ImageNet.
        student_preact: use the student's maps before their last activation, as on ImageNet.
        ce_weight: weight of the cross-entropy.
        kd_weight: weight of ``ReviewKDLoss``: 5 for resnet32x4 to resnet8x4; on ImageNet 1 for resnet34 to resnet18,
            8 for resnet50 to mobilenetv1.
        kwargs: ``student_stages``, ``teacher_stages`` of ``FeatureDistillation``, and the further arguments of
            ``Distillation`` and ``Task``.

    Raises:
        ValueError: if an argument is out of range, and see ``ReviewKDLoss`` and ``FeatureDistillation``.
    """

    teacher_before = True
    least_batch = 2  # for batch normalisation of 1x1 maps

    def __init__(
        self,
        student: str | nn.Module,
        teacher: str | nn.Module,
        num_classes: int,
        *,
        warmup_epochs: int = 20,
        student_preact: bool = False,
        ce_weight: float = 1.0,
        kd_weight: float = 5.0,
        **kwargs: Any,
    ) -> None:
        self.student_before = student_preact
        super().__init__(student, teacher, num_classes, ce_weight=ce_weight, kd_weight=kd_weight, **kwargs)
        check_numbers(least=0, whole=True, warmup_epochs=warmup_epochs)
        self.warmup_epochs = warmup_epochs
        shapes = self.student_features.shapes, self.teacher_features.shapes
        self.review = self.training_part(ReviewKDLoss(*shapes, student_preact))

    def feature_loss(self, student: StageMaps, teacher: StageMaps, target: Tensor) -> Tensor:
        warmup = min((self.current_epoch + 1) / max(self.warmup_epochs, 1), 1.0)
        return warmup * self.review(student, teacher)
