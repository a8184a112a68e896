"""MixUp: training on mixtures of two images and their labels.

Hongyi Zhang, Moustapha Cisse, Yann N. Dauphin, David Lopez-Paz. mixup: Beyond Empirical Risk Minimization. ICLR 2018,
arXiv 1710.09412.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.batch import Batch, as_batch
from lightning_kd.core.losses import at_least_float32, check_target
from lightning_kd.core.mixing import draw_mix, mix
from lightning_kd.noisy_labels.noisy_label_task import SingleNetworkTask

__all__ = ["Mixup", "mixup_loss"]


def mixup_loss(logits: Tensor, target: Tensor, partner_target: Tensor, weight: float) -> Tensor:
    """``weight`` times the cross-entropy with ``target``, plus ``1 - weight`` times that with ``partner_target``.

    This equals the cross-entropy with equally mixed labels.

    Args:
        logits: ``[B, C]``, logits of the mixed images; half precision is computed in float32, float64 stays.
        target: int64 ``[B]``, labels of the first images.
        partner_target: int64 ``[B]``, labels of the images that were mixed in.
        weight: share of the first images, in [0, 1].

    Returns:
        Scalar, mean over the batch.

    Raises:
        ValueError: if ``weight`` is out of range, or a target has another shape or dtype or is out of range (checked on
            a CPU only).

    Source: arXiv 1710.09412, equation 1.
    """
    check_numbers(least=0, most=1, remedy="give the share of the first images", weight=weight)
    check_target(logits, target)
    check_target(logits, partner_target, "partner_target")
    (logits,) = at_least_float32(logits)
    return weight * F.cross_entropy(logits, target) + (1 - weight) * F.cross_entropy(logits, partner_target)


class Mixup(SingleNetworkTask):
    """MixUp (Zhang et al., ICLR 2018, arXiv 1710.09412): train on mixtures of two images and of their labels.

    Each image is replaced by a weighted mean with another image of the batch, and its label likewise (equation 1). This
    makes it harder to learn wrong labels by heart. One mixing weight is drawn per batch. ``train/acc`` and the label
    scores of each epoch refer to the image with the larger weight of each pair.

    Several processes: mixing weight and partners are drawn per process, within its batch.

    Args:
        network: see ``SingleNetworkTask``.
        num_classes: see ``Task``.
        input_shape: see ``Task``.
        alpha: both parameters of the Beta distribution of the mixing weight, above 0.
        kwargs: ``weights`` of ``SingleNetworkTask``, and the arguments of ``FineTunedTask`` and ``Task``.

    Raises:
        ValueError: if ``alpha`` is not above 0.
    """

    def __init__(
        self,
        network: str | nn.Module,
        num_classes: int,
        *,
        input_shape: Sequence[int] = (3, 32, 32),
        alpha: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(network, num_classes, input_shape=input_shape, **kwargs)
        check_numbers(above=0, alpha=alpha)
        self.alpha = alpha

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self._draws = self.generator("mix")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch = as_batch(batch)
        self._weight, self._partner = draw_mix(self._draws, self.alpha, len(batch.target), batch.target.device)
        return super().training_step(batch._replace(image=mix(batch.image, self._partner, self._weight)), batch_idx)

    def noisy_loss(self, logits: Tensor, batch: Batch) -> Tensor:
        return mixup_loss(logits, batch.target, batch.target[self._partner], self._weight)
