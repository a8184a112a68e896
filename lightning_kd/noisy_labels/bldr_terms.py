"""One training step of BLDR: the views, the outputs of heads and exits, and the terms of the loss."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_kd.core.batch import Batch
from lightning_kd.noisy_labels.bldr_losses import (
    agreement_loss,
    exit_distillation_loss,
    exit_feature_loss,
    negative_loss,
    positive_loss,
)


class HeadOutputs(NamedTuple):
    """Logits of both heads and of the exits, and the pooled features of network and exits, for a batch."""

    positive: Tensor
    negative: Tensor
    exits: list[Tensor]
    feature: Tensor
    exit_features: list[Tensor]

    def first(self, count: int) -> HeadOutputs:
        """The outputs for the first ``count`` images."""
        exits, features = ([t[:count] for t in ts] for ts in (self.exits, self.exit_features))
        return HeadOutputs(self.positive[:count], self.negative[:count], exits, self.feature[:count], features)


class SampleRows(NamedTuple):
    """The stored values of the samples of a batch: ``u`` and ``v`` ``[B, C]``, and the sample weight ``[B]``."""

    u: Tensor
    v: Tensor
    weight: Tensor


class TermWeights(NamedTuple):
    """The weights of the terms and the temperature, see the arguments of ``BLDR``."""

    consistency_weight: float
    balance_weight: float
    separation_weight: float
    kd_weight: float
    feature_weight: float
    temperature: float
    agreement_weight: float


def bldr_terms(
    joint: HeadOutputs,
    alone: HeadOutputs,
    target: Tensor,
    samples: SampleRows,
    rho: Tensor | float,
    settings: TermWeights,
    world_size: int = 1,
) -> dict[str, Tensor]:
    """The terms of a step's loss by name, each multiplied by its weight.

    Args:
        joint: outputs for the weak views, followed by those for the strong views if there are any.
        alone: outputs for the weak views.
        target: int64 ``[B]``, the given labels.
        samples: stored values of these samples.
        rho: estimated share of wrong labels.
        settings: weights and temperature.
        world_size: number of processes, over which gradients are averaged.
    """
    u, v, weight = samples
    weights = (settings.consistency_weight, settings.balance_weight)
    positive, *exits = (
        positive_loss(logits, target, u, v, weight, rho, *weights, settings.separation_weight)
        for logits in (joint.positive, *joint.exits)
    )
    teacher = (alone.positive + alone.negative) / 2
    kd = [exit_distillation_loss(logits, teacher, settings.temperature) for logits in alone.exits]
    difference = [exit_feature_loss(feature, alone.feature) for feature in alone.exit_features]
    terms = {
        "negative": negative_loss(joint.negative, target, alone.negative.argmax(1), weight, *weights),
        "positive": positive,
        "exits": torch.stack(exits).sum(),
        "kd": settings.kd_weight * torch.stack(kd).sum(),
        # DDP averages gradients over the processes, but this is a sum over the joint batch
        "feature": settings.feature_weight * world_size * torch.stack(difference).sum(),
    }
    if settings.agreement_weight:
        terms["agreement"] = settings.agreement_weight * agreement_loss(alone.positive, alone.negative)
    return terms


def log_mean(positive: Tensor, negative: Tensor) -> Tensor:
    """Logarithm of the mean of both softmax outputs, finite for all finite logits."""
    return torch.logaddexp(positive.log_softmax(1), negative.log_softmax(1)) - math.log(2)


def weak_and_strong(batch: Batch, consistency_weight: float) -> tuple[Tensor, Tensor | None]:
    """The weak and the strong view of a batch; ``None`` for the strong view if ``consistency_weight`` is 0.

    Raises:
        ValueError: if a strong view is needed and the batch does not have two views.
    """
    views = tuple(batch.image) if isinstance(batch.image, tuple | list) else (batch.image,)
    if consistency_weight == 0:
        return views[0], None
    if len(views) != 2:
        raise ValueError(
            f"BLDR with consistency_weight={consistency_weight} needs a weak and a strong view of each image, "
            f"got {len(views)} view(s): use one of our data modules, or let your loader yield "
            "((weak, strong), target, index), or set consistency_weight to 0"
        )
    return views[0], views[1]
