"""Generalized cross-entropy, plain and truncated.

Zhilu Zhang, Mert R. Sabuncu. Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy Labels.
NeurIPS 2018, arXiv 1805.07836.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.batch import Batch
from lightning_kd.core.losses import at_least_float32, check_target
from lightning_kd.core.notes import note
from lightning_kd.noisy_labels.noisy_label_task import SingleNetworkTask

__all__ = ["GCE", "gce_loss"]


def gce_loss(logits: Tensor, target: Tensor, q: float) -> Tensor:
    """``(1 - p_y^q) / q``, mean over the batch: between cross-entropy (``q`` towards 0) and ``1 - p_y`` (``q = 1``).

    ``p_y`` is the probability of the given label. The gradient is that of the cross-entropy times ``p_y^q``, so labels
    that the network finds improbable, which are probably wrong, count less.

    Args:
        logits: ``[B, C]``; half precision is computed in float32, float64 stays.
        target: int64 ``[B]``.
        q: exponent, above 0 and at most 1.

    Returns:
        Scalar.

    Raises:
        ValueError: if ``q`` is out of range, or the target has a wrong shape or dtype or is out of range (checked on a
            CPU only).

    Source: arXiv 1805.07836, equation 6.
    """
    return _gce_losses(logits, target, q).mean()


def _gce_losses(logits: Tensor, target: Tensor, q: float) -> Tensor:
    """``gce_loss`` of each sample, ``[B]``."""
    check_numbers(above=0, most=1, remedy="0.7 is usual, and 1 gives 1 - p_y", q=q)
    check_target(logits, target)
    (logits,) = at_least_float32(logits)
    log_p = -F.cross_entropy(logits, target, reduction="none")
    return -(q * log_p).expm1() / q  # from log p, because the gradient of a power of p is infinite if p is rounded to 0


class GCE(SingleNetworkTask):
    """Generalized cross-entropy (Zhang and Sabuncu, NeurIPS 2018, arXiv 1805.07836), plain or truncated.

    A loss between cross-entropy and mean absolute error (``gce_loss``, equation 6). Labels that the network finds
    improbable count less than in cross-entropy, so wrong labels do less harm.

    With ``truncation=k`` (equation 9) labels with a probability of at most ``k`` are ignored: each sample has an
    indicator ``w_i``, 1 at the start. At the start of epoch ``start_epoch``, and every ``refresh_every`` epochs after
    it, a pass over the training set (eval mode, no augmentation) sets ``w_i`` to 1 if ``L_q(p_y) < L_q(k)``, else to 0.
    The loss is the mean of ``w_i (L_q(p_y) - L_q(k))``, which may be negative. Checkpoints hold the indicators.

    Several processes: they share the pass, and all have the same indicators.

    Args:
        network: see ``SingleNetworkTask``.
        num_classes: see ``Task``.
        input_shape: see ``Task``.
        q: exponent of ``gce_loss``, above 0 and at most 1.
        truncation: ``k``, above 0 and below 1; 0.5 in the paper. Default: no truncation.
        start_epoch: epoch, counted from 0, at which indicators are first computed: 40 on CIFAR-10, 80 on CIFAR-100.
        refresh_every: number of epochs between two passes.
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
        q: float = 0.7,
        truncation: float | None = None,
        start_epoch: int = 40,
        refresh_every: int = 10,
        **kwargs: Any,
    ) -> None:
        super().__init__(network, num_classes, input_shape=input_shape, **kwargs)
        check_numbers(above=0, most=1, remedy="0.7 is usual, and 1 gives 1 - p_y", q=q)
        check_numbers(above=0, below=1, optional=True, remedy="leave it out for none", truncation=truncation)
        check_numbers(least=0, whole=True, start_epoch=start_epoch)
        check_numbers(least=1, whole=True, refresh_every=refresh_every)
        self.q, self.truncation = q, truncation
        self.start_epoch, self.refresh_every = start_epoch, refresh_every
        if truncation is not None:
            self.bound = -math.expm1(q * math.log(truncation)) / q
            self.kept = self.add_sample_memory("kept", fill=1.0)

    def noisy_loss(self, logits: Tensor, batch: Batch) -> Tensor:
        losses = _gce_losses(logits, batch.target, self.q)
        if self.truncation is None:
            return losses.mean()
        return (self.kept.rows[self.index_of(batch)] * (losses - self.bound)).mean()

    def on_train_start(self) -> None:
        super().on_train_start()
        if self.truncation is not None:
            _ = self.data  # fail now, not only at start_epoch, if there is no data module

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        since = self.current_epoch - self.start_epoch
        if self.truncation is not None and since >= 0 and since % self.refresh_every == 0:
            self.refresh()

    def refresh(self) -> None:
        """Compute the indicators of all samples with the current network; all processes must call it together."""

        def measure(batch: Batch) -> list[Tensor]:
            return [_gce_losses(self(batch.image), batch.target, self.q)]

        index, _, _, losses = self.over_training_set(measure)
        device = self.kept.rows.device
        kept = losses < self.bound
        if not bool(kept.any()):
            note(f"no label is more probable than truncation={self.truncation} yet: all samples are kept")
            kept = torch.ones_like(kept)
        self.kept.write(index.to(device), kept.to(device))
