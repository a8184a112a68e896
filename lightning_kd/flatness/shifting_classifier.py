"""The setting of optimum shifting's paper as one LightningModule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
from torch import nn

from lightning_kd.core.supervised import Classification
from lightning_kd.flatness.shifting_callback import OptimumShifting

__all__ = ["OptimumShiftingClassifier"]


class OptimumShiftingClassifier(Classification):
    """Plain supervised training with optimum shifting (Zhou et al., AAAI 2025, arXiv 2405.14111), the paper's setting.

    ``Classification`` with the callback ``OptimumShifting``, which it adds itself; the paper's full-batch form is
    ``selection="all"``, its stochastic form the default.

    Several processes: see ``OptimumShifting``.

    Args:
        network: see ``Classification``.
        num_classes: see ``Task``.
        input_shape: see ``Task``.
        layers: see ``OptimumShifting``, as are all that follow.
        samples: number of samples to shift on.
        selection: ``"class_balanced"``, ``"random"``, ``"class_means"`` or ``"all"``.
        mode: ``"fixed"``, ``"joint"`` or ``"free"``.
        start: share of ``max_epochs`` from which ``every`` counts.
        every: shift after so many epochs. Default: at the end alone.
        at_end: shift at the end.
        momentum: ``"project"``, ``"keep"`` or ``"zero"``.
        guard: undo a shift where the held-out loss rises by more than this share.
        held_out: number of other training samples that the guard looks at.
        rtol: singular values up to this share of the largest count as 0.
        seed: of the draws.
        force: shift without samples of all classes.
        kwargs: ``weights``, ``label_smoothing`` of ``Classification``, and the arguments of ``FineTunedTask`` and
            ``Task``.

    Raises:
        ValueError: see ``OptimumShifting``; at the start of a fit with another one among its callbacks.
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
                "OptimumShiftingClassifier brings its own OptimumShifting, got another in callbacks: leave that out, "
                "or train a Classification with it"
            )
        return [*super().configure_callbacks(), *([] if known else [self.shifting])]
