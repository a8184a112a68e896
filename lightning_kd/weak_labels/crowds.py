"""Labels by several annotators: their vote, Dawid and Skene's EM, and the layer that learns each annotator's confusions.

A. P. Dawid, A. M. Skene. Maximum Likelihood Estimation of Observer Error-Rates Using the EM Algorithm. Journal of the
Royal Statistical Society C 28(1), 1979. Filipe Rodrigues, Francisco Pereira. Deep Learning from Crowds. AAAI 2018,
arXiv 1709.01779, and its code.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.annotations import check_annotations, majority_vote, observed_cells
from lightning_kd.core.losses import at_least_float32, check_shapes

__all__ = [
    "DawidSkene",
    "annotator_probabilities",
    "crowd_loss",
    "dawid_skene",
    "majority_vote",
]


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
    annotator without one uniform rows.

    It is not always better than the vote: where annotations are few and the classes unequal, it fits their noise, the
    more the longer it runs. A larger ``smoothing`` or fewer ``iterations`` help.

    Args:
        annotations: integers ``[N, R]``, -1 where there is none.
        num_classes: C.
        iterations: 0 gives the vote and the confusions that belong to it.
        smoothing: above 0.

    Raises:
        ValueError: as ``check_annotations``, for no annotation at all, and for numbers out of range.

    Source: Dawid and Skene, 1979, with a pseudo-count.
    """
    check_numbers(least=0, whole=True, iterations=iterations)
    check_numbers(above=0, smoothing=smoothing)
    given = check_annotations(annotations, num_classes)
    if not bool((given >= 0).any()):
        raise ValueError("annotations hold none, got -1 everywhere: give at least one")
    posterior = majority_vote(given, num_classes)
    confusion = confusion_of(posterior, given, smoothing)
    for k in range(iterations):
        prior = posterior.sum(0) + smoothing
        confusion = confusion_of(posterior, given, smoothing) if k else confusion
        log_prior = (prior / prior.sum()).log().expand(len(given), -1)
        posterior = posterior_of(log_prior, confusion, given)
    return DawidSkene(posterior, confusion)


def confusion_of(posterior: Tensor, annotations: Tensor, smoothing: float = 0.01) -> Tensor:
    """Confusions float64 ``[R, C, C]`` from posteriors ``[N, C]`` of the true classes: counts, and ``smoothing``."""
    classes, annotators = posterior.shape[1], annotations.shape[1]
    item, annotator, label = observed_cells(annotations)
    count = torch.zeros(annotators * classes, classes, dtype=torch.float64, device=posterior.device)
    count.index_add_(0, annotator * classes + label, posterior.double()[item])
    count = count.view(annotators, classes, classes).transpose(1, 2) + smoothing  # from [r, given, true]
    return count / count.sum(2, keepdim=True)


def posterior_of(log_prior: Tensor, confusion: Tensor, annotations: Tensor) -> Tensor:
    """Posteriors ``[N, C]`` of the true classes, proportional to prior and confusions of all annotations of an item.

    Args:
        log_prior: ``[N, C]``, not necessarily normalised.
        confusion: ``[R, C, C]``.
        annotations: int64 ``[N, R]``, -1 where there is none.
    """
    item, annotator, label = observed_cells(annotations)
    evidence = confusion.log().transpose(1, 2)[annotator, label].to(log_prior.dtype)  # [r, given, true]
    return log_prior.index_add(0, item, evidence).softmax(1)


def annotator_probabilities(probabilities: Tensor, kernel: Tensor) -> Tensor:
    """How probably each annotator gives each class: the softmax of the probabilities through the annotator's matrix.

    As it is one of probabilities, not of logits, it is flat: with identities the largest is ``e / (e + C - 1)``.

    Args:
        probabilities: of the network, ``[B, C]``; half precision is computed in float32.
        kernel: ``[C, C, R]``, at ``[k, c, r]`` what true class ``k`` adds to the score of class ``c`` of annotator ``r``.

    Returns:
        ``[B, C, R]``, summing to 1 over the second dimension.

    Raises:
        ValueError: for shapes that do not belong together.

    Source: arXiv 1709.01779, the crowd layer with a matrix for each annotator ("MW"), as in its code.
    """
    check_shapes(probabilities=(probabilities, "BC"), kernel=(kernel, "CCR"))
    probabilities, kernel = at_least_float32(probabilities, kernel)
    return torch.einsum("bk,kcr->bcr", probabilities, kernel).softmax(1)


def crowd_loss(predicted: Tensor, annotations: Tensor, per_annotation: bool = True) -> Tensor:
    """Cross-entropy of what was predicted for every annotator against what they gave; missing ones count nothing.

    Args:
        predicted: probabilities ``[B, C, R]``, see ``annotator_probabilities``; half precision is computed in float32.
        annotations: int64 ``[B, R]``, -1 where there is none.
        per_annotation: the mean over the annotations that there are; without, over all ``B * R`` cells, as in the
            paper's code, so that the loss shrinks with the number of annotators who gave nothing.

    Returns:
        A scalar; 0 with a graph where there is no annotation.

    Raises:
        ValueError: for shapes that do not belong together, and for classes out of range (which only a CPU is asked
            for).

    Source: arXiv 1709.01779, the masked cross-entropy.
    """
    each = annotation_losses(predicted, annotations)
    return each.sum() / ((annotations >= 0).sum().clamp(min=1) if per_annotation else each.numel())


def annotation_losses(predicted: Tensor, annotations: Tensor) -> Tensor:
    """The terms ``[B, R]`` of ``crowd_loss``, 0 where there is no annotation; the same checks."""
    check_shapes(predicted=(predicted, "BCR"), annotations=(annotations, "BR"))
    if annotations.device.type == "cpu":
        annotations = check_annotations(annotations, predicted.shape[1])
    (predicted,) = at_least_float32(predicted)
    given = annotations.long()
    chosen = predicted.gather(1, given.clamp(min=0)[:, None]).squeeze(1)  # -1 would be the last class
    return -chosen.clamp_min(torch.finfo(chosen.dtype).tiny).log().masked_fill(given < 0, 0.0)
