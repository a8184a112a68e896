"""LfOSA: buying what a detector of unknown classes takes for known.

Kun-Peng Ning, Xun Zhao, Yu Li, Sheng-Jun Huang. Active Learning for Open-set Annotation. CVPR 2022, arXiv 2201.06758.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_kd.active_learning.sequential_training import SequentialTrainingTask
from lightning_kd.active_learning.strategies import take_best
from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.feature_hooks import find_classifier
from lightning_kd.core.losses import at_least_float32, check_positive, check_target
from lightning_kd.core.mixture import Mixtures, fit_mixtures
from lightning_kd.core.outputs import class_logits
from lightning_kd.core.phased_loader import Phase, PhaseBatch
from lightning_kd.pool import PoolView, Query

__all__ = ["LfOSA", "known_posterior", "temperature_cross_entropy"]


def temperature_cross_entropy(
    logits: Tensor,
    target: Tensor,
    num_known: int,
    known_temperature: float = 0.5,
    unknown_temperature: float = 0.5,
) -> Tensor:
    """Mean cross-entropy of ``logits / T``, with a temperature of its own for samples of unknown classes.

    The gradient grows with ``1 / T``, and low temperatures drive the largest logits of known and unknown samples apart.

    Args:
        logits: ``[B, K + 1]``, the last one for unknown classes; half precision is computed in float32.
        target: int64 ``[B]``, 0 to K; K is unknown.
        num_known: K.
        known_temperature: T of samples with a target below K, above 0.
        unknown_temperature: T of those with target K, above 0.

    Returns:
        Scalar, float32 or float64.

    Raises:
        ValueError: for a temperature that is not above 0, another number of logits, or a target out of range.

    Source: arXiv 2201.06758, loss of the detector.
    """
    check_positive(known_temperature=known_temperature, unknown_temperature=unknown_temperature)
    _check_width(logits, num_known)
    check_target(logits, target)
    (logits,) = at_least_float32(logits)
    temperature = logits.new_full(target.shape, known_temperature).masked_fill(target >= num_known, unknown_temperature)
    return F.cross_entropy(logits / temperature[:, None], target)


def known_posterior(
    logits: Tensor,
    num_known: int,
    max_iter: int = 10,
    tol: float = 1e-2,
    variance_floor: float = 5e-4,
    monotone: bool = False,
) -> Tensor:
    """How likely each sample of a pool is of a known class, by the size of its largest logit.

    The largest logits of the samples that are predicted as the same known class are taken for a mixture of two
    Gaussians; the posterior of the one with the larger mean counts. Samples predicted unknown have 0. A sample that is
    alone in its class has 1 if its logit is above the median of the classes' larger means, else 0.5.

    A posterior need not rise with the logit: far below a narrow lower Gaussian a wide upper one wins again.
    ``monotone`` sets it to 0 below the smaller mean; above the larger it may still fall.

    Args:
        logits: ``[N, K + 1]`` of the detector, as they are (no temperature), the last one for unknown classes.
        num_known: K.
        max_iter: the most EM iterations.
        tol: a class stops when its mean log-likelihood changes by less.
        variance_floor: added to each variance.
        monotone: see above. The official code has no such thing.

    Returns:
        float64 ``[N]``, on the CPU.

    Raises:
        ValueError: for another number of logits, logits that are not finite, or a setting out of range.

    Source: arXiv 2201.06758, active sampling; settings of the mixture are those of the official code.
    """
    return _read(logits, num_known, max_iter, tol, variance_floor, monotone).log_odds.sigmoid()


class _Reading(NamedTuple):
    """What the detector says of each sample.

    ``known`` bool ``[N]``: a known class is predicted. ``log_odds`` float64 ``[N]`` of the larger Gaussian, ``-inf``
    where ``known`` is not. ``activation`` ``[N]``: the largest logit of a known class. ``unknown`` ``[N]``: the logit
    of the others.
    """

    known: Tensor
    log_odds: Tensor
    activation: Tensor
    unknown: Tensor


def _read(logits: Tensor, num_known: int, max_iter: int, tol: float, variance_floor: float, monotone: bool) -> _Reading:
    _check_width(logits, num_known)
    (logits,) = at_least_float32(logits.detach().cpu())
    activation, predicted = logits[:, :num_known].max(1)
    unknown = logits[:, num_known]
    if not (activation.isfinite() & unknown.isfinite()).all():
        raise ValueError("logits must be finite, got some that are not: train the detector with a lower learning rate")
    known = activation >= unknown
    value, group = activation[known].double(), predicted[known]
    mixtures = fit_mixtures(value, group, num_known, max_iter, tol, variance_floor)
    log_odds = torch.full(known.shape, -torch.inf, dtype=torch.float64)
    log_odds[known] = _log_odds(mixtures, value, group, monotone)
    return _Reading(known, log_odds, activation, unknown)


def _log_odds(mixtures: Mixtures, value: Tensor, group: Tensor, monotone: bool) -> Tensor:
    """Log-odds float64 ``[n]`` of the larger Gaussian of each value's group, and what stands for them without one."""
    log_odds = mixtures.log_odds(value, group)
    if monotone:
        low, high = mixtures.mean.T
        log_odds = log_odds.masked_fill((value < low[group]) & (low < high)[group], -torch.inf)
    means = mixtures.mean[mixtures.fitted, 1].numpy()
    typical = float(np.median(means)) if len(means) else torch.inf
    alone = torch.where(value > typical, torch.inf, 0.0).double()
    return torch.where(mixtures.fitted[group], log_odds, alone)


def _check_width(logits: Tensor, num_known: int) -> None:
    if logits.ndim != 2 or logits.shape[1] != num_known + 1:
        raise ValueError(
            f"logits must be [N, num_known + 1] = [N, {num_known + 1}], got {list(logits.shape)}: the last one is for "
            "unknown classes"
        )


class LfOSA(SequentialTrainingTask):
    """LfOSA (Ning et al., CVPR 2022, arXiv 2201.06758): buys what a detector of unknown classes is sure to know.

    Two networks, in turn within each epoch: the detector, with one more logit for unknown classes, learns from all
    answers by ``temperature_cross_entropy``; the classifier learns from the known ones by cross-entropy and is what is
    reported. The samples with the largest ``known_posterior`` are bought, over all classes together. Equal ones are
    ordered by its log-odds, which never saturate, by the largest logit, and by index. When all that are predicted
    known are bought, the rest are those with the smallest lead of the unknown logit.

    Logged besides what ``Task`` says: ``train/detector_loss`` and ``train/detector_acc`` over all answers. Several
    processes: see ``SequentialTrainingTask``; the choice is made from the gathered logits.

    Args:
        network: a network's name, or an ``nn.Module`` with ``K`` logits, whose copy with a new classifier is the
            detector.
        num_classes: number of known classes ``K``.
        input_shape: see ``Task``.
        known_temperature: of known samples in the detector's loss.
        unknown_temperature: of unknown ones. (The official code's own default is 2; paper and README use 0.5.)
        max_iter: the most EM iterations.
        tol: where EM stops.
        variance_floor: added to the variances.
        monotone: see ``known_posterior``.
        bottleneck_dim: put a linear layer of this width before the classifier of both networks; 2 is what the official
            code does. Default: none.
        classifier: module path of the network's classifier, where it is not the last ``nn.Linear``.
        kwargs: ``warm_start`` of ``PoolTask``, and ``optimizer``, ``lr_scheduler``, ``lr_interval``,
            ``channels_last``, ``compile`` of ``Task``.

    Raises:
        ValueError: for an argument out of range.
    """

    def __init__(
        self,
        network: str | nn.Module,
        num_classes: int,
        *,
        input_shape: Sequence[int] = (3, 32, 32),
        known_temperature: float = 0.5,
        unknown_temperature: float = 0.5,
        max_iter: int = 10,
        tol: float = 1e-2,
        variance_floor: float = 5e-4,
        monotone: bool = False,
        bottleneck_dim: int | None = None,
        classifier: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_classes, input_shape=input_shape, **kwargs)
        check_numbers(above=0, known_temperature=known_temperature, unknown_temperature=unknown_temperature)
        check_numbers(above=0, variance_floor=variance_floor)
        check_numbers(least=1, whole=True, max_iter=max_iter)
        check_numbers(least=0, remedy="give 0 to go on for all max_iter iterations", tol=tol)
        check_numbers(least=1, whole=True, optional=True, bottleneck_dim=bottleneck_dim)
        self.temperatures = (known_temperature, unknown_temperature)
        self.mixture: dict[str, Any] = {
            "max_iter": max_iter,
            "tol": tol,
            "variance_floor": variance_floor,
            "monotone": monotone,
        }
        self.detector = self.build_for(network, num_classes + 1, classifier)
        self.network = self.build(network)
        if classifier is not None:
            find_classifier(self.network, classifier)  # raises where there is none
        if bottleneck_dim is not None:
            for net in (self.detector, self.network):
                add_bottleneck(net, bottleneck_dim, classifier)

    @property
    def main_network(self) -> nn.Module:
        return self.network

    def exports(self) -> dict[str, nn.Module]:
        return {"network": self.network, "detector": self.detector}

    def detector_logits(self, image: Tensor) -> Tensor:
        """``[B, K + 1]``, float32 or wider, without temperature."""
        output = self.detector(self.format_image(image))
        (logits,) = at_least_float32(class_logits(self.detector, output, self.num_classes + 1))
        return logits

    # -- training ----------------------------------------------------------------------------------------------------

    def phases(self, data: Any) -> list[Phase]:
        answered = np.sort(np.concatenate([data.known_indices, data.unknown_indices]))
        return [
            Phase(0, self.labelled_loader(data, answered, "detector")),
            Phase(1, self.labelled_loader(data, data.known_indices, "classifier")),
        ]

    def network_loss(self, batch: PhaseBatch) -> Tensor:
        image, target = batch.labelled.image, batch.labelled.target
        if batch.network == 0:
            logits = self.detector_logits(image)
            loss = temperature_cross_entropy(logits, target, self.num_classes, *self.temperatures)
            return self.step_loss({"ce": loss}, logits, target, prefix="detector_")
        (logits,) = at_least_float32(self(image))
        return self.step_loss({"ce": F.cross_entropy(logits, target)}, logits, target)

    # -- scoring and choosing ----------------------------------------------------------------------------------------

    def pool_scores(self, image: Tensor, index: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        return self.scores_and_probabilities(image)[1], {"detector_logits": self.detector_logits(image)}

    def select(
        self, scores: Mapping[str, Tensor], pool: PoolView, budget: int, generator: np.random.Generator
    ) -> Query:
        read = _read(scores["detector_logits"], pool.num_known, **self.mixture)
        # among those predicted unknown the odds are all 0, and the lead of the unknown logit decides
        second = torch.where(read.known, read.activation, read.activation - read.unknown)
        chosen = take_best(read.known, pool, budget, read.log_odds, second).index
        position = np.searchsorted(pool.unlabelled, chosen)
        return Query(chosen, read.log_odds.sigmoid().numpy()[position])


def add_bottleneck(network: nn.Module, width: int, classifier: str | None = None) -> None:
    """Put a linear layer with ``width`` outputs before the classifier, which is made anew."""
    path, old = find_classifier(network, classifier)
    parent, _, name = path.rpartition(".")
    layers = nn.Sequential(nn.Linear(old.in_features, width), nn.Linear(width, old.out_features))
    setattr(network.get_submodule(parent), name, layers)
