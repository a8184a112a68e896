"""Early-learning regularization: ELR, and ELR+ with two networks, averaged weights and MixUp.

Sheng Liu, Jonathan Niles-Weed, Narges Razavian, Carlos Fernandez-Granda. Early-Learning Regularization Prevents
Memorization of Noisy Labels. NeurIPS 2020, arXiv 2007.00151.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.averaging import averaged_copy, update_average
from lightning_kd.core.batch import Batch
from lightning_kd.core.losses import at_least_float32
from lightning_kd.core.mixing import draw_mix, mix
from lightning_kd.core.outputs import class_logits
from lightning_kd.core.phased_loader import Phase, PhaseBatch
from lightning_kd.core.sample_memory import SampleMemory
from lightning_kd.noisy_labels.noisy_label_task import SingleNetworkTask
from lightning_kd.noisy_labels.two_networks import TwoNetworkTask

__all__ = ["ELR", "ELRPlus", "elr_regularizer"]


def elr_regularizer(logits: Tensor, memory_rows: Tensor) -> Tensor:
    """``log(1 - <t, p>)``, mean over the batch: at most 0, and lower the better prediction and memory agree.

    ``p`` is the softmax of the logits, clamped to [1e-4, 1 - 1e-4] to bound the logarithm; ``t`` is the memory. Only
    ``p`` gets gradient.

    Args:
        logits: ``[B, C]``; half precision is computed in float32, float64 stays.
        memory_rows: ``t``, ``[B, C]``, the moving average of each sample's earlier predictions; gets no gradient.

    Returns:
        Scalar.

    Raises:
        ValueError: if the shapes differ.

    Source: arXiv 2007.00151, equation 6.
    """
    if logits.ndim != 2 or logits.shape != memory_rows.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)} and memory_rows {tuple(memory_rows.shape)} must both be [B, C]: give the "
            "rows of the batch's samples"
        )
    agreement = (memory_rows.detach() * _clamped(logits)).sum(1)
    return (-agreement).log1p().mean()


def _clamped(logits: Tensor) -> Tensor:
    (logits,) = at_least_float32(logits)
    return logits.softmax(1).clamp(1e-4, 1 - 1e-4)


def _remember(memory: SampleMemory, index: Tensor, probabilities: Tensor, momentum: float) -> Tensor:
    """Move the memory rows of ``index`` towards the normalised ``probabilities``, and return them: ``[B, C]``."""
    seen = probabilities.detach()
    rows = momentum * memory.rows[index] + (1 - momentum) * seen / seen.sum(1, keepdim=True)
    memory.write(index, rows)
    return memory.rows[index]


def _check(momentum: float, weight: float) -> None:
    check_numbers(least=0, below=1, remedy="0.7 or 0.9 in the paper", momentum=momentum)
    check_numbers(least=0, remedy="3 on CIFAR-10 and 7 on CIFAR-100 in the paper", weight=weight)


def ramp(step: int, length: int) -> float:
    """``exp(-5 (1 - step / length)^2)``, and 1 from step ``length`` on; always 1 if ``length`` is 0."""
    return math.exp(-5 * (1 - min(step / length, 1.0)) ** 2) if length else 1.0


class ELR(SingleNetworkTask):
    """ELR (Liu et al., NeurIPS 2020, arXiv 2007.00151): a regulariser against learning wrong labels by heart.

    Networks fit the clean labels first and memorise the wrong ones later. ELR keeps a moving average of the predictions
    for each sample, which mostly comes from the early phase, and adds a regulariser that pulls the predictions towards
    it (``elr_regularizer``; equations 6 and 9). In each step the average is updated first and then
    used.

    Several processes: a sample is on one process per epoch; the averages are exchanged at the end of the epoch.

    Args:
        network: see ``SingleNetworkTask``.
        num_classes: see ``Task``.
        input_shape: see ``Task``.
        momentum: weight of the old average in each update (beta in the paper), at least 0 and below 1: 0.7 on CIFAR-10
            with symmetric noise, 0.9 with asymmetric noise and on CIFAR-100.
        weight: weight of the regulariser (lambda in the paper): 3, 1 and 7 in these three cases.
        kwargs: ``weights`` of ``SingleNetworkTask``, and the arguments of ``FineTunedTask`` and ``Task``.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        network: str | nn.Module,
        num_classes: int,
        *,
        input_shape: Sequence[int] = (3, 32, 32),
        momentum: float = 0.7,
        weight: float = 3.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(network, num_classes, input_shape=input_shape, **kwargs)
        _check(momentum, weight)
        self.momentum, self.weight = momentum, weight
        self.memory = self.add_sample_memory("predictions", (num_classes,))

    def noisy_loss(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        rows = _remember(self.memory, self.index_of(batch), _clamped(logits), self.momentum)
        return {"ce": F.cross_entropy(logits, batch.target), "elr": self.weight * elr_regularizer(logits, rows)}


class ELRPlus(TwoNetworkTask):
    """ELR+ (Liu et al., NeurIPS 2020, arXiv 2007.00151): ELR with two networks, averaged copies of both, and MixUp.

    As in ``ELR`` a regulariser pulls the predictions towards a moving average of earlier predictions. Here that average
    comes from the other network: from a copy of it with averaged weights, which makes fewer mistakes.

    In each epoch network 1 and then network 2 passes over the whole training set, each in its own order. In a step of
    network ``k`` the averaged copy of the other network predicts the unmixed images (without gradient), and the memory
    of ``k`` is updated with the result. Network ``k`` is trained on mixed images, labels and memory rows. After each
    step its copy is updated by a moving average whose rate rises from near 0 to ``average_rate`` over ``average_steps``
    steps. As in the official code the copies predict in train mode: they normalise by the batch, and collect their own
    running statistics, with which they are evaluated.

    Predictions use the mean of the logits of network 1 and of the averaged copy of network 2. The label scores logged
    each epoch come from the averaged copies, on augmented training images.

    Several processes: mixing is drawn per process; memories are exchanged at the end of each epoch.

    Args:
        network: see ``TwoNetworkTask``.
        num_classes: see ``Task``.
        input_shape: see ``Task``.
        momentum: see ``ELR``; 0.7 on CIFAR-10, 0.9 on CIFAR-100.
        weight: see ``ELR``; 3 on CIFAR-10, 7 on CIFAR-100.
        ramp_steps: number of steps of a network over which the weight of the regulariser rises; 0 for no ramp, 40000 on
            CIFAR-100.
        refine_labels: multiply the mixed labels by the mixed memory rows and normalise them; on CIFAR-100.
        mixup_alpha: both parameters of the Beta distribution of the mixing weight, above 0.
        average_rate: final weight of the old average in each update of the copies, at least 0 and below 1.
        average_steps: number of steps of a network over which that weight rises; 0 for no ramp.
        averages_in_train_mode: let the copies predict in train mode, as in the official code. ``False``: they predict
            in eval mode and copy the running statistics of their networks after each step; the rate after step ``s`` is
            that of the ramp at ``s``, not at ``s + 1``.
        kwargs: ``gradient_clip_val`` of ``TwoNetworkTask``; ``optimizer``, ``lr_scheduler``, ``lr_interval``,
            ``channels_last``, ``compile`` of ``Task``.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        network: str | nn.Module,
        num_classes: int,
        *,
        input_shape: Sequence[int] = (3, 32, 32),
        momentum: float = 0.7,
        weight: float = 3.0,
        ramp_steps: int = 0,
        refine_labels: bool = False,
        mixup_alpha: float = 1.0,
        average_rate: float = 0.997,
        average_steps: int = 40000,
        averages_in_train_mode: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(network, num_classes, input_shape=input_shape, **kwargs)
        _check(momentum, weight)
        check_numbers(above=0, mixup_alpha=mixup_alpha)
        check_numbers(least=0, whole=True, ramp_steps=ramp_steps, average_steps=average_steps)
        check_numbers(least=0, below=1, remedy="0.997 in the paper", average_rate=average_rate)
        self.momentum, self.weight, self.ramp_steps = momentum, weight, ramp_steps
        self.refine_labels, self.mixup_alpha = refine_labels, mixup_alpha
        self.average_rate, self.average_steps = average_rate, average_steps
        self.averages_in_train_mode = averages_in_train_mode
        self.averages = nn.ModuleList(averaged_copy(net) for net in self.networks).train(averages_in_train_mode)
        self.keep_precise("averages")
        for k in range(2):  # two memories, not two columns of one: a sample's two passes may be on different processes
            self.add_sample_memory(f"predictions_{k + 1}", (num_classes,))
        self.steps_done = [0, 0]

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.averages.train(mode and self.averages_in_train_mode)
        return self

    def setup(self, stage: str) -> None:
        super().setup(stage)
        resting = 0 if self.averages_in_train_mode else sum(1 for _ in self.averages.modules())
        if stage == "fit" and resting and resting == sum(not module.training for module in self.modules()):
            warnings.filterwarnings("ignore", f"Found {resting} module\\(s\\) in eval mode")

    # -- predictions -------------------------------------------------------------------------------------------------

    def averaged_logits(self, k: int, image: Tensor) -> Tensor:
        """Logits ``[B, C]`` of the averaged copy of network ``k``, float32 or wider."""
        average = self.averages[k]
        (logits,) = at_least_float32(class_logits(average, average(self.format_image(image)), self.num_classes))
        return logits

    def forward(self, image: Tensor) -> Tensor:
        """The mean of the logits of network 1 and of the averaged copy of network 2, ``[B, C]``."""
        return (self.logits_of(0, image) + self.averaged_logits(1, image)) / 2

    def scores_and_probabilities(self, image: Tensor) -> tuple[Tensor, Tensor]:
        logits = self(image)
        return logits, self.probabilities(logits)

    def exports(self) -> dict[str, nn.Module]:
        averages = {f"network_{k + 1}_averaged": average for k, average in enumerate(self.averages)}
        return {**super().exports(), **averages}

    # -- training ----------------------------------------------------------------------------------------------------

    def phases(self, data: Any) -> list[Phase]:
        return [
            Phase(
                k, data.loader("train", shuffle=True, augment=True, batch_size=data.batch_size, stream=f"network_{k}")
            )
            for k in range(2)
        ]

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self._draws = [self.generator("mix", k) for k in range(2)]

    def network_step(self, k: int, batch: PhaseBatch) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        labelled = batch.labelled
        image, target = labelled.image, labelled.target
        with torch.no_grad():
            other = self.averaged_logits(1 - k, image)
            self.record_batch(labelled, other, 1 - k)
            memory = self.memories[f"predictions_{k + 1}"]
            rows = _remember(memory, self.index_of(labelled), other.softmax(1), self.momentum)
            weight, partner = draw_mix(self._draws[k], self.mixup_alpha, len(target), target.device)
            rows = mix(rows, partner, weight)
            label = mix(F.one_hot(target, self.num_classes).to(rows.dtype), partner, weight)
            if self.refine_labels:
                label = label * rows.clamp_min(1e-12)  # a label whose rows are all 0 must not become NaN
                label = label / label.sum(1, keepdim=True)
        logits = self.logits_of(k, mix(image, partner, weight))
        regularizer = ramp(self.steps_done[k] + 1, self.ramp_steps) * self.weight * elr_regularizer(logits, rows)
        return {"ce": F.cross_entropy(logits, label.to(logits.dtype)), "elr": regularizer}, logits, target

    def optimize(self, k: int, terms: dict[str, Tensor], logits: Tensor, target: Tensor) -> None:
        super().optimize(k, terms, logits, target)
        self.steps_done[k] += 1
        step = self.steps_done[k] + self.averages_in_train_mode
        rate = self.average_rate * ramp(step, self.average_steps)
        buffers: Any = "keep" if self.averages_in_train_mode else "copy"
        update_average(self.averages[k], self.networks[k], rate, buffers=buffers)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["steps_done"] = list(self.steps_done)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.steps_done = list(checkpoint["steps_done"])
