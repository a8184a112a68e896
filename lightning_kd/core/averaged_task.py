"""The base class of methods that keep a moving average of their network's weights and may predict with it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.averaging import averaged_copy, update_average
from lightning_kd.core.batch import as_batch
from lightning_kd.core.supervised_task import SupervisedTask

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["AveragedTask"]


class AveragedTask(SupervisedTask):
    """One trained network, ``network`` (the live one), and a moving average of its weights, ``average``.

    After every step ``average = average_decay * average + (1 - average_decay) * network``, also for the running
    statistics of batch normalisation. The average is always in eval mode, part of checkpoints, and float32 at every
    precision of the Trainer. ``answer_with`` chooses the network that is validated, tested, used for predictions and
    written as ``network.pt``. With ``"better"`` both are validated; the one with the better monitored metric is used
    from then on, and logged as ``val/...``. Before the first validation, or without one, it is the live network.
    ``val/live_map`` and ``val/average_map`` (or the monitored metric of another problem) show both.

    Several processes: all average the same weights.

    Args:
        network: see ``SupervisedTask``.
        num_classes: see ``Task``.
        average_decay: the weight of the old average in a step, in [0, 1). The average is over about the last
            ``1 / (1 - average_decay)`` steps: lower it for a short training.
        answer_with: ``"average"``, ``"live"`` or ``"better"``.
        kwargs: ``input_shape``, ``weights`` of ``SupervisedTask``, and the arguments of ``FineTunedTask`` and ``Task``.
    """

    #: keep an average even if the live network is used for predictions
    needs_average = False

    def __init__(
        self,
        network: str | nn.Module,
        num_classes: int,
        *,
        average_decay: float = 0.9997,
        answer_with: Literal["average", "live", "better"] = "average",
        **kwargs: Any,
    ) -> None:
        super().__init__(network, num_classes, **kwargs)
        check_numbers(least=0, below=1, remedy="0.9997 in the papers", average_decay=average_decay)
        if answer_with not in ("average", "live", "better"):
            raise ValueError(f"answer_with must be 'average', 'live' or 'better', got {answer_with!r}: give one")
        self.average_decay = average_decay
        self.answer_with = answer_with
        self.average: nn.Module | None = None
        self._average_answers = answer_with == "average"
        self._averaged_at = 0
        self.average_metrics = self._evaluation_metrics("val/") if answer_with == "better" else None
        self.keep_precise("average", "average_metrics")
        self.start_average()

    def start_average(self) -> None:
        """Set the average to a copy of the network; call it after changing the network in ``__init__``."""
        if self.needs_average or self.answer_with != "live":
            self.average = averaged_copy(self.network).eval()

    @property
    def main_network(self) -> nn.Module:
        return self.average if self._average_answers and self.average is not None else self.network

    # -- training ----------------------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        average = getattr(self, "average", None)  # __init__ may call this before it is set
        if average is not None:
            average.eval()
        return self

    def setup(self, stage: str) -> None:
        if self.average is not None and not any(network is self.average for network in self._built):
            self._built.append(self.average)
        super().setup(stage)

    def modules_at_rest(self) -> list[nn.Module]:
        return [*super().modules_at_rest(), *([] if self.average is None else self.average.modules())]

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self._averaged_at = self.trainer.global_step

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        # average after optimizer steps only: with accumulate_grad_batches not every batch makes one
        if self.average is not None and self.trainer.global_step != self._averaged_at:
            self._averaged_at = self.trainer.global_step
            update_average(self.average, self.network, self.average_decay, buffers="average")

    # -- evaluation of the live network or the average ---------------------------------------------------------------

    @contextmanager
    def answering(self, by_average: bool) -> Iterator[None]:
        """A context in which ``main_network`` is the average, or else the live network."""
        before, self._average_answers = self._average_answers, by_average
        try:
            yield
        finally:
            self._average_answers = before

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        with self.answering(self._average_answers and self.average_metrics is None):
            super().validation_step(batch, batch_idx)
        if self.average_metrics is not None:
            with self.answering(True):
                self.update_metrics(self.average_metrics, as_batch(batch))

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        if self.average_metrics is not None:
            self._begin(self.average_metrics)

    def on_validation_epoch_end(self) -> None:
        if self.average_metrics is None:
            super().on_validation_epoch_end()
            return
        both = {"live": self.val_metrics, "average": self.average_metrics}
        name = self.problem.monitored
        found = {kind: float(metrics.compute()[self.monitor]) for kind, metrics in both.items()}
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            sign = 1 if self.monitor_mode == "max" else -1
            live, average = (-math.inf if math.isnan(found[kind]) else sign * found[kind] for kind in both)
            self._average_answers = average > live
        self.log_dict({f"val/{kind}_{name}": value for kind, value in found.items()})
        self._log_metrics(both["average" if self._average_answers else "live"])

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.average is not None:  # load_weights reads it too
            checkpoint["average_answers"] = self._average_answers

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if self.answer_with == "better":
            self._average_answers = checkpoint.get("average_answers", self._average_answers)
