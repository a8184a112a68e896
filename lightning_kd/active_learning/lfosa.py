"""LfOSA: queries the samples that a detector of unknown classes is most certain to be of known classes.

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
    """Cross-entropy of ``logits / T``, mean over the batch, with one ``T`` for known and one for unknown samples.

    The gradient is scaled by ``1 / T``: low temperatures increase the difference between the largest logits of known
    and of unknown samples, which ``known_posterior`` uses.

    Args:
        logits: ``[B, K + 1]``, the last one for unknown classes; half precision is computed in float32.
        target: int64 ``[B]``, 0 to K; K means unknown.
        num_known: K.
        known_temperature: T of samples with a target below K; above 0.
        unknown_temperature: T of samples with target K; above 0.

    Returns:
        Scalar, float32 or float64.

    Raises:
        ValueError: for a temperature that is not above 0, a number of logits other than K + 1, or a target out of
            range.

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
    """The probability that each sample of a pool belongs to a known class, from the size of its largest logit.

    For each known class, a mixture of two Gaussians is fitted to the largest logits of the samples predicted as that
    class; the result is the posterior probability of the Gaussian with the larger mean. Samples predicted as unknown
    get 0. If a class has one sample alone, it gets 1 if its logit is above the median of the other classes' larger
    means, else 0.5.

    The posterior need not increase with the logit: if the lower Gaussian is narrow and the upper one wide, the upper
    one is likelier again far below. ``monotone`` sets the posterior to 0 below the smaller mean; above the larger mean
    it may still decrease.

    Args:
        logits: ``[N, K + 1]`` of the detector, without temperature; the last one is for unknown classes.
        num_known: K.
        max_iter: the most EM iterations.
        tol: EM for a class ends when its mean log-likelihood changes by less than this.
        variance_floor: added to each variance.
        monotone: see above; False as in the official code.

    Returns:
        float64 ``[N]``, on the CPU.

    Raises:
        ValueError: for a number of logits other than K + 1, logits that are not finite, or a setting out of range.

    Source: arXiv 2201.06758, active sampling; settings of the mixture are those of the official code.
    """
    return _read(logits, num_known, max_iter, tol, variance_floor, monotone).log_odds.sigmoid()


class _Reading(NamedTuple):
    """What ``known_posterior`` and the query need of each sample.

    Attributes:
        known: bool ``[N]``, whether a known class is predicted.
        log_odds: float64 ``[N]``, log-odds of the Gaussian with the larger mean; ``-inf`` where ``known`` is False.
        activation: ``[N]``, the largest logit of a known class.
        unknown: ``[N]``, the logit for unknown classes.
    """

    known: Tensor
    log_odds: Tensor
    activation: Tensor
    unknown: Tensor


def _read(logits: Tensor, num_known: int, max_iter: int, tol: float, variance_floor: float, monotone: bool) -> _Reading:
    _check_width(logits, num_known)
    (logits,) = at_least_float32(logits.detach().cpu())
    predicted = torch.from_numpy(logits[:, :num_known].numpy().argmax(1))  # the first of equal ones, as max(1)
    activation = logits.gather(1, predicted[:, None])[:, 0]
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
    """Log-odds float64 ``[n]`` of the Gaussian with the larger mean in each value's group.

    A group without a mixture (one sample) has infinite ones if its logit is above the median of the larger means of
    all groups, else 0.
    """
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
    """LfOSA (Ning et al., CVPR 2022, arXiv 2201.06758): queries samples that are most probably of known classes.

    A pool of collected images holds many of unwanted classes. LfOSA trains a detector, which has one more logit for
    unknown classes, on all answers, and queries the samples whose largest logit looks like that of a known class. A
    second network, the classifier, learns the labelled samples of known classes; it is the one that is reported.

    The detector's loss is ``temperature_cross_entropy``, the classifier's cross-entropy; the two are trained in turn
    within each epoch. The query takes the samples with the largest ``known_posterior`` over all classes together. They
    are ordered by its log-odds, which still differ where the posterior is rounded to 1, then by the largest logit, then
    by index. Samples predicted as unknown come last, ordered by how little the unknown logit exceeds the largest
    logit of a known class.

    Logged in addition to ``Task``: ``train/detector_loss`` and ``train/detector_acc`` over all answers. Several
    processes: see ``SequentialTrainingTask``; the query is chosen from the gathered logits.

    Args:
        network: a network's name (``lightning-kd list``), or an ``nn.Module`` with ``K`` logits, whose copy with a new
            classifier is the detector.
        num_classes: number of known classes ``K``. From the command line it comes from the data module.
        input_shape: see ``Task``.
        known_temperature: temperature of known samples in the detector's loss.
        unknown_temperature: temperature of unknown samples. (2 by default in the official code; its README and the
            paper use 0.5.)
        max_iter: the most EM iterations.
        tol: EM ends when the mean log-likelihood changes by less than this.
        variance_floor: added to the variances.
        monotone: see ``known_posterior``.
        bottleneck_dim: insert a linear layer of this width before the classifier of both networks; the official code
            does so with 2. Default: no such layer.
        classifier: module path of the network's classifier. Default: the last ``nn.Linear``.
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
        """The detector's logits ``[B, K + 1]``, float32 or wider, not divided by a temperature."""
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
        # all samples predicted unknown have log-odds -inf: order them by the difference of the two largest logits
        second = torch.where(read.known, read.activation, read.activation - read.unknown)
        chosen = take_best(read.known, pool, budget, read.log_odds, second).index
        position = np.searchsorted(pool.unlabelled, chosen)
        return Query(chosen, read.log_odds.sigmoid().numpy()[position])


def add_bottleneck(network: nn.Module, width: int, classifier: str | None = None) -> None:
    """Insert a linear layer with ``width`` outputs before the classifier, which gets new weights."""
    path, old = find_classifier(network, classifier)
    parent, _, name = path.rpartition(".")
    layers = nn.Sequential(nn.Linear(old.in_features, width), nn.Linear(width, old.out_features))
    setattr(network.get_submodule(parent), name, layers)
