"""PS-KD: no teacher; what the network said of an image an epoch ago softens its target, more so as training goes on.

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
        target: int64 ``[B]``. A label matrix is refused: what was remembered is of images that were not mixed.
        past: ``[B, C]``, earlier probabilities of these samples; half precision is computed in float32.
        alpha: from 0 to 1.

    Returns:
        ``[B, C]``, rows that sum to 1; where ``past`` is one-hot too, exactly that.

    Raises:
        ValueError: for another shape, dtype or ``alpha``, and for a target out of range and rows of ``past`` that do
            not sum to 1 (which only a CPU is asked for).

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

    A bank holds the softmax of each training image in its latest training step, as the network was and on the view that
    it saw then; at the start it is the label. Cross-entropy is with ``progressive_target``, whose ``alpha`` rises from
    epoch to epoch, ``alpha_t * (epoch + 1) / epochs``. Epoch 0 is therefore plain cross-entropy.

    The bank is in checkpoints: 4 bytes for each image and class, which is 20 MB for CIFAR-100. Batches must have an
    index, as those of our data modules. With images that are mixed there is no telling what to remember; their targets
    are refused.

    Several processes: a sample is on one process an epoch, and the banks are put together at its end.

    Args:
        network: see ``SupervisedTask``.
        num_classes: see ``Task``.
        alpha_t: ``alpha`` in the last epoch, from 0 to 1: 0.8 on CIFAR-100.
        bank_on_host: keep the bank in the host's memory, where a GPU has no room for it (5 GB for ImageNet).
        kwargs: ``input_shape``, ``weights`` of ``SupervisedTask``, and the arguments of ``FineTunedTask`` and ``Task``.

    Raises:
        ValueError: in a fit without a number of epochs, and where a resumed one finds no bank in its checkpoint.
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
        """How much the past counts in the current epoch.

        Raises:
            ValueError: where the number of epochs is not known.
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
        if not resumed:  # also images that the first epoch leaves out have a past then
            self.bank.rows.zero_()
            if target is not None:
                labelled = (target >= 0).nonzero().squeeze(1).to(self.bank.rows.device)
                self.bank.rows[labelled, target.to(labelled.device)[labelled]] = 1

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch = as_batch(batch)
        index = self.index_of(batch)
        (logits,) = at_least_float32(self(batch.image))
        if not second_pass():  # or the past would be what has just been written
            past = self.bank.read(index)
            unknown = past.sum(1, keepdim=True) == 0  # of a loader whose labels nobody knew before
            unknown |= self.current_epoch == 0  # also of an image that is drawn again in the first epoch
            past = torch.where(unknown, F.one_hot(batch.target, self.num_classes).to(past), past)
            self._soft_target = progressive_target(batch.target, past, self.alpha)
            self.bank.write(index, logits.softmax(1))
        assert self._soft_target is not None
        return self.step_loss({"ce": soft_cross_entropy(logits, self._soft_target)}, logits, batch.target)
