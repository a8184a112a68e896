"""Co-teaching: two networks that select training samples for each other.

Bo Han, Quanming Yao, Xingrui Yu, Gang Niu, Miao Xu, Weihua Hu, Ivor Tsang, Masashi Sugiyama. Co-teaching: Robust
Training of Deep Neural Networks with Extremely Noisy Labels. NeurIPS 2018, arXiv 1804.06872.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.batch import as_batch
from lightning_kd.core.losses import at_least_float32, check_target
from lightning_kd.core.schedules import TiedSchedule
from lightning_kd.noisy_labels.label_scores import LabelScores
from lightning_kd.noisy_labels.noisy_label_task import NoisyLabelTask
from lightning_kd.noisy_labels.two_networks import TwoNetworkTask

__all__ = ["CoTeaching", "LateLinearLR", "coteaching_losses", "forget_rate"]


def forget_rate(epoch: int, noise_rate: float, ramp_epochs: int = 10, exponent: float = 1.0) -> float:
    """The share of each batch that is dropped in an epoch: it rises linearly from 0, then stays at ``noise_rate``.

    Args:
        epoch: counted from 0.
        noise_rate: the share of wrong labels (tau in the paper), at least 0 and below 1.
        ramp_epochs: number of epochs in which it rises (T_k), at least 1.
        exponent: exponent of ``noise_rate`` during the rise (c), above 0.

    Returns:
        ``noise_rate^exponent * epoch / (ramp_epochs - 1)`` for epochs below ``ramp_epochs``, else ``noise_rate``.

    Raises:
        ValueError: if an argument is out of range.

    Source: arXiv 1804.06872, section 4, as in the paper's code.
    """
    check_numbers(least=0, below=1, remedy="give the share of wrong labels", noise_rate=noise_rate)
    check_numbers(least=1, whole=True, ramp_epochs=ramp_epochs)
    check_numbers(above=0, remedy="1 is usual", exponent=exponent)
    if epoch >= ramp_epochs:
        return noise_rate
    return noise_rate**exponent * epoch / max(ramp_epochs - 1, 1)


def coteaching_losses(logits_1: Tensor, logits_2: Tensor, target: Tensor, forget_rate: float) -> tuple[Tensor, Tensor]:
    """The mean cross-entropy of each network on the samples for which the other network has the smallest loss.

    Each network selects the ``floor((1 - forget_rate) B)`` samples with its smallest losses (on ties the first). The
    selection gets no gradient. If no sample is selected, both losses are 0.

    Args:
        logits_1: ``[B, C]``, logits of the first network; half precision is computed in float32, float64 stays.
        logits_2: ``[B, C]``, logits of the second network.
        target: int64 ``[B]``.
        forget_rate: the share of samples that are dropped, in [0, 1].

    Returns:
        ``(loss_1, loss_2)``, scalars.

    Raises:
        ValueError: if the logits differ in shape, ``forget_rate`` is out of range, or the target has another shape or
            dtype or is out of range (checked on a CPU only).

    Source: arXiv 1804.06872, algorithm 1.
    """
    if logits_1.shape != logits_2.shape:
        raise ValueError(
            f"logits_1 {tuple(logits_1.shape)} and logits_2 {tuple(logits_2.shape)} must both be [B, C]: give both "
            "networks the same batch"
        )
    check_target(logits_1, target)
    losses, _ = _exchange((logits_1, logits_2), target, forget_rate)
    return losses[0], losses[1]


def _exchange(logits: Sequence[Tensor], target: Tensor, forget_rate: float) -> tuple[list[Tensor], list[Tensor]]:
    """The losses of ``coteaching_losses``, and the positions that each network selected, int64 ``[n]``."""
    check_numbers(least=0, most=1, remedy="give the share to drop", forget_rate=forget_rate)
    kept = math.floor((1 - forget_rate) * len(target) + 1e-9)  # (1 - 0.9) * 10 is a little below 1
    each = [F.cross_entropy(z, target, reduction="none") for z in at_least_float32(*logits)]
    chosen = [loss.detach().argsort(stable=True)[:kept] for loss in each]
    return [loss[other].sum() / max(kept, 1) for loss, other in zip(each, reversed(chosen), strict=True)], chosen


class CoTeaching(TwoNetworkTask):
    """Co-teaching (Han et al., NeurIPS 2018, arXiv 1804.06872): two networks select training samples for each other.

    Networks learn clean labels before wrong ones, so samples with a small loss are probably labelled correctly. Two
    networks see the same batches. Each is trained on the samples for which the other network has the smallest loss, so
    that it does not reinforce its own mistakes.

    The share of dropped samples rises with the epochs (``forget_rate``; as in the paper's code the first epoch that is
    trained counts as 1). A batch from which no sample is selected is skipped. ``train/pure_ratio`` is the share of
    clean labels among the selected samples, mean over batches and networks. The label scores of each epoch come from
    the mean logits of both networks in the training steps.

    Predictions, ``val/acc`` and ``test/acc`` use the sum of both networks' logits. The paper's code tests each network
    separately: compare its tables with ``test/acc_1`` and ``test/acc_2``.

    Several processes: each selects within its own batch.

    Args:
        network: see ``TwoNetworkTask``.
        num_classes: see ``Task``.
        input_shape: see ``Task``.
        noise_rate: the share of wrong labels, known or estimated, at least 0 and below 1. It must be given.
        ramp_epochs: number of epochs in which the share of dropped samples rises (T_k in the paper).
        exponent: exponent of ``noise_rate`` during the rise, see ``forget_rate``.
        kwargs: ``gradient_clip_val`` of ``TwoNetworkTask``; ``optimizer``, ``lr_scheduler``, ``lr_interval``,
            ``channels_last``, ``compile`` of ``Task``.

    Raises:
        ValueError: if ``noise_rate`` is not given, or an argument is out of range.
    """

    def __init__(
        self,
        network: str | nn.Module,
        num_classes: int,
        *,
        input_shape: Sequence[int] = (3, 32, 32),
        noise_rate: float | None = None,
        ramp_epochs: int = 10,
        exponent: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(network, num_classes, input_shape=input_shape, **kwargs)
        if noise_rate is None:
            raise ValueError(
                "noise_rate must be given, got None: Co-teaching drops this share of each batch, so give the share of "
                "wrong labels, or 0.2 if you do not know it"
            )
        forget_rate(0, noise_rate, ramp_epochs, exponent)  # checks the arguments
        self.noise_rate, self.ramp_epochs, self.exponent = noise_rate, ramp_epochs, exponent
        self.test_each = nn.ModuleList(
            MulticlassAccuracy(num_classes, average="micro", validate_args=False) for _ in range(2)
        )
        self._answers: list[Tensor] = []

    def scores_and_probabilities(self, image: Tensor) -> tuple[Tensor, Tensor]:
        self._answers = [self.logits_of(k, image) for k in range(2)]
        first, second = self._answers
        return first + second, (self.probabilities(first) + self.probabilities(second)) / 2

    def test_step(self, batch: Any, batch_idx: int) -> None:
        super().test_step(batch, batch_idx)
        each: Any = self.test_each
        for k, metric in enumerate(each):
            metric.update(self._answers[k], as_batch(batch).target)
            self.log(f"test/acc_{k + 1}", metric, on_step=False, on_epoch=True)

    def train_loader(self, data: Any) -> Any:
        return NoisyLabelTask.train_loader(self, data)  # one stream for both networks

    def steps_of_epoch(self) -> int | None:
        batches = super().steps_of_epoch()
        return None if batches is None else 2 * batches  # both networks make a step for each batch

    def training_step(self, batch: Any, batch_idx: int) -> None:
        batch = as_batch(batch)
        logits = [self.logits_of(k, batch.image) for k in range(2)]
        self.record_batch(batch, (logits[0] + logits[1]) / 2)
        rate = forget_rate(self.current_epoch + 1, self.noise_rate, self.ramp_epochs, self.exponent)
        losses, chosen = _exchange(logits, batch.target, rate)
        if len(chosen[0]) == 0:  # the same on every process, as their batches have one size
            return
        if "clean_target" in batch.extras:
            right = (batch.extras["clean_target"] == batch.target).float()
            self.accumulate(("pure_ratio",), torch.stack([right[kept] for kept in chosen]).mean()[None], 1)
        for k, loss in enumerate(losses):
            self.optimize(k, {"ce": loss}, logits[k], batch.target)

    def log_scores(self, *scores: LabelScores, without: Sequence[str] = ()) -> None:
        super().log_scores(*scores, without=[*without, "pure_ratio"])  # logged for the selected samples instead


class LateLinearLR(TiedSchedule):
    """A constant learning rate until ``start_epoch``, then linear decay to 0 at ``epochs``, as in Co-teaching's code.

    Args:
        optimizer: the optimizer whose learning rate is set.
        start_epoch: the epoch, counted from 0, at which the decay starts.
        epochs: number of epochs of the run, above ``start_epoch``. Default: taken from the Trainer, see
            ``TiedSchedule``.
        late_beta1: new value of Adam's first beta from ``start_epoch`` on. Default: unchanged.
        last_epoch: see ``torch.optim.lr_scheduler.LRScheduler``.

    Raises:
        ValueError: if ``epochs`` is not above ``start_epoch``, or an argument is out of range.

    Source: arXiv 1804.06872, as in the paper's code: start_epoch 80, epochs 200, late_beta1 0.1.
    """

    length_name = "epochs"

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        start_epoch: int,
        epochs: int | None = None,
        late_beta1: float | None = None,
        last_epoch: int = -1,
    ) -> None:
        check_numbers(least=0, whole=True, start_epoch=start_epoch)
        check_numbers(least=1, whole=True, optional=True, epochs=epochs)
        check_numbers(least=0, below=1, optional=True, late_beta1=late_beta1)
        check_numbers(least=-1, whole=True, last_epoch=last_epoch)
        self.to_the_end = epochs is None
        if epochs is not None and start_epoch >= epochs:
            raise ValueError(f"start_epoch must be below epochs={epochs}, got {start_epoch}: lower it")
        self.start_epoch, self.epochs, self.late_beta1 = start_epoch, epochs, late_beta1
        super().__init__(optimizer, last_epoch)

    def length_in(self, training: int) -> int:
        return max(training, self.start_epoch + 1)

    def rates(self, epoch: int, length: int) -> list[Any]:
        left = (length - epoch) / (length - self.start_epoch) if epoch > self.start_epoch else 1.0
        return [base * min(max(left, 0.0), 1.0) for base in self.base_lrs]

    def get_lr(self) -> list[Any]:
        if self.late_beta1 is not None and self.last_epoch >= self.start_epoch:
            for group in self.optimizer.param_groups:
                group["betas"] = (self.late_beta1, group["betas"][1])
        return super().get_lr()
