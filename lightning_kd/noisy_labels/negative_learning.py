"""Negative learning: the network learns for each image a class that it does not have.

Youngdong Kim, Junho Yim, Juseung Yun, Junmo Kim. NLNL: Negative Learning for Noisy Labels. ICCV 2019, arXiv 1908.07387.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core import losses
from lightning_kd.core.batch import Batch
from lightning_kd.noisy_labels.noisy_label_task import SingleNetworkTask

__all__ = ["NegativeLearning", "negative_learning_loss"]


def negative_learning_loss(logits: Tensor, complementary_target: Tensor, eps: float = 1e-5) -> Tensor:
    """``-log(1 - p_k)`` of the complementary classes ``k``, mean over samples and complementary classes.

    ``1 - p_k`` is clamped to at least ``eps``, as in the paper's code: the loss is at most ``-log(eps)``, and clamped
    samples have no gradient. See also ``lightning_kd.core.losses.negative_learning_loss``.

    Args:
        logits: ``[B, C]``; half precision is computed in float32, float64 stays.
        complementary_target: int64 ``[B]``, or ``[B, M]`` for several classes per sample; repeated classes count
            repeatedly.
        eps: lower bound of ``1 - p_k``, in [0, 1); 0 for no clamping.

    Returns:
        Scalar.

    Raises:
        ValueError: if a shape or dtype is wrong, the batch is empty, or ``eps`` is out of range.

    Source: arXiv 1908.07387, equation 2.
    """
    return losses.negative_learning_loss(logits, complementary_target, eps)


class NegativeLearning(SingleNetworkTask):
    """Negative learning, the first stage of NLNL (Kim et al., ICCV 2019, arXiv 1908.07387).

    Instead of "this image has this class" the network learns "this image does not have that class", for a random class
    other than the given label (a complementary class). If the given label is wrong, a random other class is still
    almost always truly absent.

    Complementary classes are drawn anew in each step, uniformly and with replacement. The later stages of the paper
    (selective negative learning, selective positive learning, pseudo-labels) are not part of this class.

    Several processes: complementary classes are drawn per process.

    Args:
        network: see ``SingleNetworkTask``.
        num_classes: see ``Task``.
        input_shape: see ``Task``.
        complementary_labels: number of classes drawn per image: 1 with 10 classes, about 110 with 100.
        balanced: weight each sample by the size of the largest class divided by the size of its own class, counted by
            given labels, as in the paper's code. It needs a data module of this package.
        eps: see ``negative_learning_loss``.
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
        complementary_labels: int = 1,
        balanced: bool = True,
        eps: float = 1e-5,
        **kwargs: Any,
    ) -> None:
        super().__init__(network, num_classes, input_shape=input_shape, **kwargs)
        check_numbers(least=1, whole=True, complementary_labels=complementary_labels)
        check_numbers(least=0, below=1, remedy="give 0 for no clamp", eps=eps)
        self.complementary_labels, self.balanced, self.eps = complementary_labels, balanced, eps
        self._class_weight: Tensor | None = None

    def on_train_start(self) -> None:
        super().on_train_start()
        if self.balanced:
            given = self.data.train_target[torch.from_numpy(self.data.train_indices)]
            count = given.bincount(minlength=self.num_classes).clamp_min(1)  # weights of absent classes are not used
            self._class_weight = (count.max() / count).to(self.device, torch.float32)

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self._draws = self.generator("complementary")

    def noisy_loss(self, logits: Tensor, batch: Batch) -> Tensor:
        chosen = draw_complementary(batch.target, self.num_classes, self.complementary_labels, self._draws)
        weight = None if self._class_weight is None else self._class_weight[batch.target]
        return losses.negative_learning_loss(logits, chosen, self.eps, weight)


def draw_complementary(target: Tensor, num_classes: int, count: int, generator: np.random.Generator) -> Tensor:
    """Draw ``count`` classes per sample other than its label, uniformly and with replacement: int64 ``[B, count]``."""
    step = torch.from_numpy(generator.integers(1, num_classes, (len(target), count))).to(target.device)
    return (target[:, None] + step) % num_classes
