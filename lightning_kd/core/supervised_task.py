"""The base class of supervised training: one network and the loss of its problem."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lightning_kd.core.batch import as_batch
from lightning_kd.core.fine_tuning import FineTunedTask
from lightning_kd.core.losses import at_least_float32

__all__ = ["SupervisedTask"]


class SupervisedTask(FineTunedTask):
    """One network, trained with the loss of the problem. A subclass sets ``problem_class``.

    After ``fit`` the run folder holds ``network.pt``, a plain ``state_dict``; a distillation task takes it, or the
    checkpoint, as ``teacher_weights``.

    Args:
        network: a network's name (``lightning-kd list``) or any ``nn.Module`` that gives the logits of the problem.
        num_classes: see ``Task``.
        input_shape: see ``Task``.
        weights: checkpoint or ``state_dict`` file to start from; ``"default"`` for the published weights of a ``timm/``
            or ``torchvision/`` network. Default: train from scratch.
        kwargs: ``new_classifier``, ``freeze``, ``backbone_lr`` of ``FineTunedTask``; ``optimizer`` (default: see
            ``optimizer_for``), ``lr_scheduler``, ``lr_interval``, ``channels_last``, ``compile`` of ``Task``.
    """

    loss_is_plain = True

    def __init__(
        self,
        network: str | nn.Module,
        num_classes: int,
        *,
        input_shape: Sequence[int] = (3, 32, 32),
        weights: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_classes, input_shape=input_shape, **kwargs)
        self.network = self.build_to_train(network, weights)

    @property
    def main_network(self) -> nn.Module:
        return self.network

    def loss(self, output: Any, logits: Tensor, target: Tensor) -> dict[str, Tensor]:
        """The terms of the loss by name; their sum is the loss.

        Args:
            output: everything that the network returned.
            logits: the logits in it, float32 or float64.
            target: targets of the batch.
        """
        return {"supervised": self.problem.loss(logits, target)}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch = as_batch(batch)
        output = self.network(self.format_image(batch.image))
        (logits,) = at_least_float32(self.problem.logits(output, batch.image, self.network))
        return self.step_loss(self.loss(output, logits, batch.target), logits, batch.target)
