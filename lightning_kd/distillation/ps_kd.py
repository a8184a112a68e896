"""PS-KD: self-distillation with the network's own predictions from the previous epoch, without a teacher.

Kyungyul Kim, ByeongMoon Ji, Doyoung Yoon, Sangheum Hwang. Self-Knowledge Distillation with Progressive Refinement of
Targets. ICCV 2021, arXiv 2006.12000.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.batch import as_batch
from lightning_kd.core.losses import at_least_float32, check_target, soft_cross_entropy
from lightning_kd.core.sample_memories import SampleMemories
from lightning_kd.core.supervised_task import SupervisedTask
from lightning_kd.core.two_pass_step import second_pass

__all__ = ["PSKD", "progressive_target"]


def progressive_target(target: Tensor, past: Tensor, alpha: float) -> Tensor:
    """``(1 - alpha) onehot(target) + alpha past``, without gradient.

    Args:
        target: int64 ``[B]``. Label matrices are refused, since ``past`` belongs to images that were not mixed.
        past: ``[B, C]``, earlier probabilities of these samples; half precision is computed in float32.
        alpha: weight of ``past``, from 0 to 1.

    Returns:
        ``[B, C]``, rows with sum 1.

    Raises:
        ValueError: if a shape or dtype is wrong, ``alpha`` is out of range, a target is out of range, or a row of
            ``past`` does not sum to 1 (values are checked on a CPU only).

    Source: arXiv 2006.12000, equation 3.
    """
    check_target(past, target)
    check_numbers(least=0, most=1, alpha=alpha)
    (past,) = at_least_float32(past.detach())
    if past.device.type == "cpu" and not ((past.sum(1) - 1).abs() < 0.01).all():
        raise ValueError(
            f"past must hold probabilities that sum to 1, got sums from {past.sum(1).min():g} to "
            f"{past.sum(1).max():g}: begin with one-hot labels"
        )
    return torch.lerp(F.one_hot(target, past.shape[1]).to(past), past, alpha)


class PSKD(SampleMemories, SupervisedTask):
    """PS-KD (Kim et al., ICCV 2021, arXiv 2006.12000): self-distillation with progressively refined targets.

    The network is its own teacher: the target of each image is a mixture of the label and of the network's prediction
    for this image one epoch earlier. The share of the prediction grows during training.

    A bank stores the softmax output of each training image from its latest training step; at the start it holds the
    label. The loss is cross-entropy with ``progressive_target``, with ``alpha = alpha_t * (epoch + 1) / epochs``. In
    epoch 0 it equals plain cross-entropy.

    Checkpoints hold the bank: 4 bytes per image and class, 20 MB for CIFAR-100. Batches need an index, as those of the
    data modules of this package have. Targets of mixed images raise an error, since their predictions belong to no
    single image.

    Several processes: a sample is on one process per epoch, and the banks are exchanged at the end of the epoch.

    Args:
        network: see ``SupervisedTask``.
        num_classes: see ``Task``.
        alpha_t: ``alpha`` in the last epoch, from 0 to 1: 0.8 on CIFAR-100.
        bank_on_host: keep the bank in CPU memory, if the GPU has no room for it (5 GB for ImageNet).
        kwargs: ``input_shape``, ``weights`` of ``SupervisedTask``, and the arguments of ``FineTunedTask`` and ``Task``.

    Raises:
        ValueError: if ``alpha_t`` is out of range; in a fit, if the number of epochs is unknown, or the checkpoint of a
            resumed run holds no bank.
    """

    def __init__(
        self,
        network: str | nn.Module,
        num_classes: int,
        *,
        alpha_t: float = 0.8,
        bank_on_host: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(network, num_classes, **kwargs)
        check_numbers(least=0, most=1, alpha_t=alpha_t)
        self.alpha_t = alpha_t
        self.bank = self.add_sample_memory("predictions", (num_classes,), on_host=bank_on_host)
        self._soft_target: Tensor | None = None

    @property
    def alpha(self) -> float:
        """The weight of the earlier predictions in the current epoch.

        Raises:
            ValueError: if the number of epochs is unknown.
        """
        epochs = self.schedule_length("epoch")
        if epochs is None:
            raise ValueError(
                f"alpha_t is reached in the last epoch, and max_epochs={self.trainer.max_epochs} does not say which "
                "that is: give trainer.max_epochs"
            )
        return self.alpha_t * min((self.current_epoch + 1) / epochs, 1.0)

    def on_train_start(self) -> None:
        resumed = self.trainer.ckpt_path is not None
        if resumed and not len(self.bank.rows):
            raise ValueError(
                f"the checkpoint {self.trainer.ckpt_path} holds no predictions of the training samples: go on from one "
                "that PSKD wrote, or start anew with its weights (model.weights)"
            )
        super().on_train_start()
        target = getattr(getattr(self.trainer, "datamodule", None), "train_target", None)
        if not resumed:  # so that images that the first epoch leaves out have an entry too
            self.bank.rows.zero_()
            if target is not None:
                labelled = (target >= 0).nonzero().squeeze(1).to(self.bank.rows.device)
                self.bank.rows[labelled, target.to(labelled.device)[labelled]] = 1

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch = as_batch(batch)
        index = self.index_of(batch)
        (logits,) = at_least_float32(self(batch.image))
        if not second_pass():  # the second evaluation must not read what the first has written
            past = self.bank.read(index)
            unknown = past.sum(1, keepdim=True) == 0  # a plain loader: labels were not known at the start
            unknown |= self.current_epoch == 0  # also for an image that is drawn twice in the first epoch
            past = torch.where(unknown, F.one_hot(batch.target, self.num_classes).to(past), past)
            self._soft_target = progressive_target(batch.target, past, self.alpha)
            self.bank.write(index, logits.softmax(1))
        assert self._soft_target is not None
        return self.step_loss({"ce": soft_cross_entropy(logits, self._soft_target)}, logits, batch.target)
