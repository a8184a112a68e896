"""The EM algorithm of Dawid and Skene: true classes and annotators' confusion matrices from annotations alone.

A. P. Dawid, A. M. Skene. Maximum Likelihood Estimation of Observer Error-Rates Using the EM Algorithm. Journal of the
Royal Statistical Society C 28(1), 1979.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.annotations import check_annotations, majority_vote, observed_cells

__all__ = ["DawidSkene", "dawid_skene"]

# item, annotator and class of every annotation
Cells = tuple[Tensor, Tensor, Tensor]


class DawidSkene(NamedTuple):
    """The result of ``dawid_skene`` for ``N`` items, ``R`` annotators and ``C`` classes.

    Attributes:
        posterior: float64 ``[N, C]``, the probability of each true class for each item.
        confusion: float64 ``[R, C, C]``; ``[r, k, l]`` is the probability that annotator ``r`` gives class ``l`` to an
            item of true class ``k``.
    """

    posterior: Tensor
    confusion: Tensor


def dawid_skene(annotations: Any, num_classes: int, iterations: int = 50, smoothing: float = 0.01) -> DawidSkene:
    """Estimate true classes and confusion matrices by expectation maximisation, from the annotations alone.

    The posterior starts as the majority vote. Each iteration estimates class priors and confusion matrices from the
    posterior, with ``smoothing`` added to every count, and then the posterior from both (in logarithms). The
    log-likelihood plus ``smoothing`` times the sum of the logarithms of all priors and confusion entries never
    decreases. An item without annotations gets the prior as posterior; an annotator without annotations gets uniform
    rows. Without any annotation everything is uniform.

    EM is not always better than the vote: with few annotations and classes of unequal frequency it overfits them, more
    so with more iterations. A larger ``smoothing`` or fewer ``iterations`` help.

    Args:
        annotations: integers ``[N, R]``, -1 for a missing annotation.
        num_classes: number of classes ``C``.
        iterations: number of EM iterations; 0 returns the vote and its confusion matrices.
        smoothing: pseudo-count, above 0.

    Returns:
        ``DawidSkene``: posterior ``[N, C]`` and confusion matrices ``[R, C, C]``, float64.

    Raises:
        ValueError: if an argument is out of range, and see ``check_annotations``.

    Source: Dawid and Skene, 1979, with a pseudo-count.
    """
    check_numbers(least=0, whole=True, iterations=iterations)
    check_numbers(above=0, smoothing=smoothing)
    given = check_annotations(annotations, num_classes)
    cells = observed_cells(given)
    posterior = majority_vote(given, num_classes)
    confusion = _confusion(posterior, cells, given.shape[1], smoothing)
    for k in range(iterations):
        prior = posterior.sum(0) + smoothing
        confusion = _confusion(posterior, cells, given.shape[1], smoothing) if k else confusion
        log_prior = (prior / prior.sum()).log().expand(len(given), -1)
        posterior = _posterior(log_prior, confusion, cells)
    return DawidSkene(posterior, confusion)


def confusion_of(posterior: Tensor, annotations: Tensor, smoothing: float = 0.01) -> Tensor:
    """Confusion matrices float64 ``[R, C, C]`` from posteriors ``[N, C]``: normalised counts plus ``smoothing``."""
    return _confusion(posterior, observed_cells(annotations), annotations.shape[1], smoothing)


def _confusion(posterior: Tensor, cells: Cells, annotators: int, smoothing: float) -> Tensor:
    classes, (item, annotator, label) = posterior.shape[1], cells
    count = torch.zeros(annotators * classes, classes, dtype=torch.float64, device=posterior.device)
    count.index_add_(0, annotator * classes + label, posterior.double()[item])
    count = count.view(annotators, classes, classes).transpose(1, 2) + smoothing  # from [r, given, true]
    return count / count.sum(2, keepdim=True)


def posterior_of(log_prior: Tensor, confusion: Tensor, annotations: Tensor) -> Tensor:
    """Posteriors ``[N, C]`` of the true classes: prior times the confusion entries of all annotations, normalised.

    Args:
        log_prior: ``[N, C]``, logarithm of the prior; need not be normalised.
        confusion: ``[R, C, C]``, see ``DawidSkene``.
        annotations: integers ``[N, R]``, -1 for a missing annotation.
    """
    return _posterior(log_prior, confusion, observed_cells(annotations))


def _posterior(log_prior: Tensor, confusion: Tensor, cells: Cells) -> Tensor:
    item, annotator, label = cells
    evidence = confusion.log().transpose(1, 2)[annotator, label].to(log_prior.dtype)  # [r, given, true]
    return log_prior.index_add(0, item, evidence).softmax(1)
