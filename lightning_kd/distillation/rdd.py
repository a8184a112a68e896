"""RDD: choose by relative difficulty which pixels a small segmentation network learns from, and when.

Dong Liang, Yue Sun, Yun Du, Songcan Chen, Sheng-Jun Huang. Relative Difficulty Distillation for Semantic Segmentation.
2024, arXiv 2407.03719.
"""

from __future__ import annotations

from numbers import Integral
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.outputs import auxiliary_logits, resized
from lightning_kd.distillation.rdd_losses import (
    RULES,
    Rule,
    count_of,
    disputed_loss,
    disputed_pixels,
    easy_first_loss,
    hard_pixels,
    relative_difficulty,
)
from lightning_kd.distillation.segmentation_distillation import Heads, SegmentationDistillation, pixel_kd_loss

__all__ = [
    "RDD",
    "disputed_loss",
    "disputed_pixels",
    "easy_first_loss",
    "hard_pixels",
    "pixel_kd_loss",
    "relative_difficulty",
]


class RDD(SegmentationDistillation):
    """RDD (Liang et al., 2024, arXiv 2407.03719): relative difficulty distillation for semantic segmentation.

    Training has two stages. In the first the student learns mostly from pixels that are easy for the teacher, where the
    teacher's two heads agree (``easy_first_loss``). From step ``t_w`` on (counted from 1) it learns from pixels that
    exactly one of the two networks finds hard (``disputed_loss``). Distillation of the teacher's outputs runs in both
    stages. The two losses differ in scale, as in the official code: the first is a mean over all pixels, the second
    over the selected ones.

    The official code switches at once from the first to the second stage; whether the paper's final method does so is
    not stated. A resumed run continues in its stage. Steps are optimizer steps, also with gradient accumulation.

    Several processes: all switch stages in the same step; thresholds and masks are computed from each process's own
    pixels.

    Args:
        student: see ``SegmentationDistillation``; without an auxiliary head the terms of that head are left out.
        teacher: see ``SegmentationDistillation``; it needs an auxiliary head.
        num_classes: see ``Task``.
        warmup: ``t_w``: a whole number of steps, or a share of the training from 0.0 to 1.0. The first stage has
            ``t_w - 1`` steps. In the paper 0.1, 4,000 of 40,000 steps.
        handover: ``"hard"``: switch at once; ``"soft"``: from ``t_w`` on the weight moves linearly from the first to
            the second loss until the end of training.
        stage: ``"both"``, or for comparison only the first (``"easy"``) or only the second (``"disputed"``).
        rule: which pixels the second stage uses, see ``disputed_pixels``.
        threshold: probability up to which a pixel is hard, see ``hard_pixels``.
        min_kept: smallest number of hard pixels, see ``hard_pixels``: a number per batch of a process, or a share. The
            paper's 100,000 are 4.8 % of its 4 crops of 512 x 1024.
        class_weight: weights of the ``C`` classes in the second stage. Default: equal.
        mean_over: pixels over which the first loss is averaged, see ``easy_first_loss``.
        kwargs: ``loss``, ``temperature``, ``auxiliary_weight``, ``ce_weight``, ``kd_weight`` of
            ``SegmentationDistillation``, and the further arguments of ``Distillation`` and ``Task``.

    Raises:
        ValueError: if the teacher has no auxiliary head, or an argument is out of range.
    """

    def __init__(
        self,
        student: str | nn.Module,
        teacher: str | nn.Module,
        num_classes: int,
        *,
        warmup: int | float = 0.1,
        handover: Literal["hard", "soft"] = "hard",
        stage: Literal["both", "easy", "disputed"] = "both",
        rule: Rule = "xor",
        threshold: float = 0.7,
        min_kept: int | float = 0.05,
        class_weight: list[float] | None = None,
        mean_over: Literal["all", "valid"] = "all",
        **kwargs: Any,
    ) -> None:
        super().__init__(student, teacher, num_classes, **kwargs)
        for name, value, known in (
            ("handover", handover, ("hard", "soft")),
            ("stage", stage, ("both", "easy", "disputed")),
            ("rule", rule, RULES),
            ("mean_over", mean_over, ("all", "valid")),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")
        count_of(warmup, 1, "warmup")
        count_of(min_kept, 1, "min_kept")
        check_numbers(least=0, most=1, threshold=threshold)
        for weight in class_weight or ():
            check_numbers(least=0, class_weight=weight)
        if class_weight is not None and len(class_weight) != num_classes:
            raise ValueError(f"class_weight needs {num_classes} numbers, one a class, got {len(class_weight)}")
        self.warmup, self.handover, self.stage = warmup, handover, stage
        self.rule, self.threshold, self.min_kept = rule, threshold, min_kept
        self.class_weight, self.mean_over = class_weight, mean_over
        self._lengths: tuple[int, int] | None = None
        if stage != "disputed":
            self._check_teacher()

    def _check_teacher(self) -> None:
        """Check the teacher's outputs on a small image before training starts."""
        height, width = (min(side, 64) for side in self.input_shape[1:])
        given = next(self.teacher.network.parameters(), torch.empty(0))
        image = torch.zeros(1, self.input_shape[0], height, width, dtype=given.dtype, device=given.device)
        try:
            with torch.random.fork_rng(devices=[]):
                output = self.teacher.output(image)
        except Exception:  # the image may be too small for it; then the first batch is checked
            return
        self._check_auxiliary(auxiliary_logits(output), output)

    def _check_auxiliary(self, auxiliary: Tensor | None, output: Any) -> None:
        if auxiliary is None:
            raise ValueError(
                f"the teacher must have an auxiliary head beside the main one, got {type(output).__name__} of the main "
                "logits alone: give a network that returns 'out' and 'aux', or two maps of logits, or set stage: "
                "disputed"
            )

    # -- stages ------------------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        super().on_train_start()
        self._lengths = None
        if self.stage == "both":
            warmup, total = self._warmup_and_total()
            if total is not None and warmup > total:
                rank_zero_warn(
                    f"warmup={self.warmup} is more than the {total} steps of the training, so that its second stage "
                    "never begins: give fewer, or a share such as 0.1"
                )

    def _warmup_and_total(self) -> tuple[int, int | None]:
        """``t_w`` and the number of training steps, which may be ``None`` if it is unknown and not needed."""
        if self._lengths is None:
            total = self.schedule_length("step")
            if total is None and (not isinstance(self.warmup, Integral) or self.handover == "soft"):
                raise ValueError(
                    f"warmup={self.warmup} with handover={self.handover!r} needs the number of steps, which max_epochs "
                    "and the data do not say: give max_steps, or a whole number of steps and a hard handover"
                )
            self._lengths = count_of(self.warmup, total or 0, "warmup"), total
        return self._lengths

    def easy_share(self, step: int) -> float:
        """The weight of the first stage's loss in a step, counted from 1."""
        if self.stage != "both":
            return float(self.stage == "easy")
        warmup, total = self._warmup_and_total()
        if step < warmup:
            return 1.0
        if self.handover == "hard":
            return 0.0
        assert total is not None
        return max(total - step, 0) / max(total - warmup, 1)

    # -- losses ------------------------------------------------------------------------------------------------------

    def task_loss(self, student: Heads, teacher: Heads, target: Tensor) -> Tensor:
        share = self.easy_share(self.trainer.global_step + 1)
        parts = []
        if share > 0:
            self._check_auxiliary(teacher.auxiliary, teacher)
            weight = self._weight(teacher, target)
            easy = easy_first_loss(
                *student[:2], target, weight, auxiliary_weight=self.auxiliary_weight, mean_over=self.mean_over
            )
            self.accumulate(("easy_weight",), weight.mean()[None], weight.numel())
            parts.append(share * easy)
        if share < 1:
            disputed = disputed_loss(
                *student[:2], *teacher[:2], target, self.rule, self.threshold, self.min_kept, self.class_weight,
                auxiliary_weight=self.auxiliary_weight,
            )  # fmt: skip
            parts.append((1 - share) * disputed)
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]

    def _weight(self, teacher: Heads, target: Tensor) -> Tensor:
        main, auxiliary = teacher.coarse
        assert auxiliary is not None
        return relative_difficulty(main, resized(auxiliary, main.shape[-2:], align_corners=True), target.shape[-2:])

    @torch.no_grad()
    def pixel_maps(self, image: Tensor, target: Tensor) -> dict[str, Tensor]:
        """The weights and the selected pixels of the two stages for labelled images, to draw pictures.

        Args:
            image: ``[B, C', H, W]``, normalised as the data module does.
            target: int64 ``[B, H, W]``.

        Returns:
            maps ``[B, H, W]`` by name: ``difficulty weight``, if the teacher has an auxiliary head, and
                ``disputed pixels``, bool.
        """
        student, teacher = self.student_heads(image), self.teacher_heads(image)
        pair = student.main, teacher.main
        disputed = disputed_pixels(*pair, target, self.rule, self.threshold, self.min_kept)
        weight = {} if teacher.auxiliary is None else {"difficulty weight": self._weight(teacher, target)}
        return {**weight, "disputed pixels": disputed}
