"""Symmetric cross-entropy.

Yisen Wang, Xingjun Ma, Zaiyi Chen, Yuan Luo, Jinfeng Yi, James Bailey. Symmetric Cross Entropy for Robust Learning
with Noisy Labels. ICCV 2019, arXiv 1908.06112.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.batch import Batch
from lightning_kd.core.losses import at_least_float32, check_target
from lightning_kd.noisy_labels.noisy_label_task import SingleNetworkTask

__all__ = ["SCE", "sce_loss"]

LOG_ZERO = math.log(1e-4)


def sce_loss(logits: Tensor, target: Tensor, alpha: float, beta: float, log_zero: float = LOG_ZERO) -> Tensor:
    """``alpha`` times the cross-entropy plus ``beta`` times the reverse cross-entropy, mean over the batch.

    The reverse cross-entropy exchanges label and prediction. With the logarithm of 0 replaced by ``log_zero``, it
    equals ``-log_zero`` times the total probability of all classes but the given label. It is at most ``-log_zero`` (up
    to rounding), so a wrong label has bounded influence. Probabilities are clamped to at least 1e-7; clamped ones have
    no gradient.

    Args:
        logits: ``[B, C]``; half precision is computed in float32, float64 stays.
        target: int64 ``[B]``.
        alpha: weight of the cross-entropy, at least 0.
        beta: weight of the reverse cross-entropy, at least 0.
        log_zero: value that replaces the logarithm of 0 (``A`` in the paper, there -4), below 0. Default: ``ln 1e-4`` =
            -9.2103.

    Returns:
        Scalar, mean over the batch.

    Raises:
        ValueError: if a weight is negative, ``log_zero`` is not below 0, or the target has another shape or dtype or is
            out of range (checked on a CPU only).

    Source: arXiv 1908.06112, equations 5 to 7.
    """
    _check(alpha, beta, log_zero)
    check_target(logits, target)
    (logits,) = at_least_float32(logits)
    others = logits.softmax(1).clamp_min(1e-7).scatter(1, target[:, None], 0.0)
    return alpha * F.cross_entropy(logits, target) - beta * log_zero * others.sum(1).mean()


def _check(alpha: float, beta: float, log_zero: float) -> None:
    check_numbers(least=0, alpha=alpha, beta=beta)
    check_numbers(below=0, remedy="-4 in the paper, ln 1e-4 by default", log_zero=log_zero)


class SCE(SingleNetworkTask):
    """Symmetric cross-entropy (Wang et al., ICCV 2019, arXiv 1908.06112), equation 7.

    The loss is the cross-entropy plus the reverse cross-entropy, in which label and prediction change places. The
    second part is bounded, so wrong labels do less harm (see ``sce_loss``).

    Several processes: only gradients are shared.

    Args:
        network: see ``SingleNetworkTask``.
        num_classes: see ``Task``.
        input_shape: see ``Task``.
        alpha: weight of the cross-entropy: 0.1 on CIFAR-10, 6 on CIFAR-100.
        beta: weight of the reverse cross-entropy.
        log_zero: see ``sce_loss``.
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
        alpha: float = 0.1,
        beta: float = 1.0,
        log_zero: float = LOG_ZERO,
        **kwargs: Any,
    ) -> None:
        super().__init__(network, num_classes, input_shape=input_shape, **kwargs)
        _check(alpha, beta, log_zero)
        self.alpha, self.beta, self.log_zero = alpha, beta, log_zero

    def noisy_loss(self, logits: Tensor, batch: Batch) -> Tensor:
        return sce_loss(logits, batch.target, self.alpha, self.beta, self.log_zero)
