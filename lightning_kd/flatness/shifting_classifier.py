"""Supervised training with optimum shifting, as in the paper's experiments, as one LightningModule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
from torch import nn

from lightning_kd.core.supervised import Classification
from lightning_kd.flatness.shifting_callback import OptimumShifting

__all__ = ["OptimumShiftingClassifier"]


class OptimumShiftingClassifier(Classification):
    """Supervised training with optimum shifting (Zhou et al., AAAI 2025, arXiv 2405.14111), as in the paper.

    On given samples, many weights of a layer give the same outputs. Optimum shifting replaces the weight of a layer by
    the smallest of these, which leaves the loss on the samples unchanged but makes the minimum flatter.

    This class is ``Classification`` with the callback ``OptimumShifting``, which it adds itself. The default is the
    paper's stochastic form, on a class-balanced sample; ``selection="all"`` is its full-batch form.

    Several processes: see ``OptimumShifting``.

    Args:
        network: see ``Classification``.
        num_classes: see ``Task``.
        input_shape: see ``Task``.
        layers: module paths of the layers to shift; see ``OptimumShifting``, as for all that follow. Default: the
            classifier.
        samples: number of samples to shift on.
        selection: ``"class_balanced"``, ``"random"``, ``"class_means"`` or ``"all"``.
        mode: what happens to the bias: ``"fixed"``, ``"joint"`` or ``"free"``.
        start: share of ``max_epochs`` after which ``every`` begins to count.
        every: shift every so many epochs. Default: only at the end.
        at_end: shift at the end.
        momentum: ``"project"``, ``"keep"`` or ``"zero"``.
        guard: undo a shift if the held-out loss rises by more than this share; ``None``: never.
        held_out: number of other training samples on which the guard measures the loss.
        rtol: singular values up to this share of the largest count as 0. Default: see ``shift_linear``.
        seed: seed of the draws of samples.
        force: shift although samples of some classes are missing.
        kwargs: ``weights``, ``label_smoothing`` of ``Classification``, and the arguments of ``FineTunedTask`` and
            ``Task``.

    Raises:
        ValueError: see ``OptimumShifting``; also if the callbacks hold another ``OptimumShifting``.
    """

    def __init__(
        self,
        network: str | nn.Module,
        num_classes: int,
        *,
        input_shape: Sequence[int] = (3, 32, 32),
        layers: list[str] | None = None,
        samples: int | None = None,
        selection: str = "class_balanced",
        mode: str = "fixed",
        start: float = 0.5,
        every: int | None = None,
        at_end: bool = True,
        momentum: str = "project",
        guard: float | None = 0.05,
        held_out: int = 1000,
        rtol: float | None = None,
        seed: int = 0,
        force: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(network, num_classes, input_shape=input_shape, **kwargs)
        self.shifting = OptimumShifting(
            layers, samples, selection, mode, start, every, at_end, momentum, guard, held_out, rtol, seed, force
        )

    def configure_callbacks(self) -> list[L.Callback]:
        known = [c for c in self.trainer.callbacks if isinstance(c, OptimumShifting)]  # type: ignore[attr-defined]
        if self.trainer.state.fn == "fit" and any(c is not self.shifting for c in known):
            raise ValueError(
                "OptimumShiftingClassifier adds its own OptimumShifting, got another in callbacks: leave that out, "
                "or train a Classification with it"
            )
        return [*super().configure_callbacks(), *([] if known else [self.shifting])]
