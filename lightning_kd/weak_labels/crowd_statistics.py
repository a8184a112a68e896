"""What annotations alone say of true classes and of the people who gave them: the EM of Dawid and Skene.

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
    """``posterior`` float64 ``[N, C]`` of the true class of each item, and ``confusion`` float64 ``[R, C, C]``: how
    probably annotator ``r`` gives class ``l`` to an item of class ``k``, at ``[r, k, l]``."""

    posterior: Tensor
    confusion: Tensor


def dawid_skene(annotations: Any, num_classes: int, iterations: int = 50, smoothing: float = 0.01) -> DawidSkene:
    """True classes and confusions of the annotators by expectation maximisation, from the annotations alone.

    The posterior starts as the vote. An iteration takes priors and confusions from it, with ``smoothing`` added to
    every count, and then the posterior from these, by logarithms. The log-likelihood plus ``smoothing`` times the sum
    of the logarithms of all priors and confusions never falls. An item without an annotation gets the prior, an
    annotator without one uniform rows; of no annotation at all everything is uniform.

    It is not always better than the vote: where annotations are few and the classes unequal, it fits their noise, the
    more the longer it runs. A larger ``smoothing`` or fewer ``iterations`` help.

    Args:
        annotations: integers ``[N, R]``, -1 where there is none.
        num_classes: C.
        iterations: 0 gives the vote and the confusions that belong to it.
        smoothing: above 0.

    Raises:
        ValueError: as ``check_annotations``, and for numbers out of range.

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
    """Confusions float64 ``[R, C, C]`` from posteriors ``[N, C]`` of the true classes: counts, and ``smoothing``."""
    return _confusion(posterior, observed_cells(annotations), annotations.shape[1], smoothing)


def _confusion(posterior: Tensor, cells: Cells, annotators: int, smoothing: float) -> Tensor:
    classes, (item, annotator, label) = posterior.shape[1], cells
    count = torch.zeros(annotators * classes, classes, dtype=torch.float64, device=posterior.device)
    count.index_add_(0, annotator * classes + label, posterior.double()[item])
    count = count.view(annotators, classes, classes).transpose(1, 2) + smoothing  # from [r, given, true]
    return count / count.sum(2, keepdim=True)


def posterior_of(log_prior: Tensor, confusion: Tensor, annotations: Tensor) -> Tensor:
    """Posteriors ``[N, C]`` of the true classes, proportional to prior and confusions of all annotations of an item.

    Args:
        log_prior: ``[N, C]``, not necessarily normalised.
        confusion: ``[R, C, C]``.
        annotations: integers ``[N, R]``, -1 where there is none.
    """
    return _posterior(log_prior, confusion, observed_cells(annotations))


def _posterior(log_prior: Tensor, confusion: Tensor, cells: Cells) -> Tensor:
    item, annotator, label = cells
    evidence = confusion.log().transpose(1, 2)[annotator, label].to(log_prior.dtype)  # [r, given, true]
    return log_prior.index_add(0, item, evidence).softmax(1)
