"""From logits to label scores, which tell how probably each given label is right."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.losses import at_least_float32, check_target
from lightning_kd.core.mixture import Mixture, fit_mixture
from lightning_kd.core.scaling import min_max
from lightning_kd.file_writing import write_text
from lightning_kd.metrics import memorisation, selection_metrics
from lightning_kd.spreadsheet import csv_text


def logit_margin(logits: Tensor, target: Tensor) -> Tensor:
    """The logit of the given label minus the largest other logit, ``[B]``: above 0 if the label is predicted.

    Args:
        logits: ``[B, C]`` with at least 2 classes; half precision is computed in float32.
        target: int64 ``[B]``, the given labels.

    Returns:
        ``[B]``, float32 or float64.

    Raises:
        ValueError: if a shape or dtype is wrong, or a label is out of range (checked on a CPU only).

    Source: DPC, arXiv 2401.07062, large-margin sample selection.
    """
    check_target(logits, target)
    (logits,) = at_least_float32(logits)
    own = logits.gather(1, target[:, None])
    others = logits.scatter(1, target[:, None], float("-inf"))
    return own.squeeze(1) - others.amax(1)


def unit_scores(scores: Tensor, clip: float = 0.0) -> Tensor:
    """Scores ``[N]`` scaled linearly to [0, 1], in float64; all 1 if they are equal.

    Args:
        scores: ``[N]``, finite.
        clip: share of the scores that is clipped at either end first, so that outliers do not squeeze the others
            together.

    Raises:
        ValueError: if there is no score, one is not finite, or ``clip`` is not in [0, 0.5).
    """
    if scores.ndim != 1 or len(scores) == 0:
        raise ValueError(f"scores must be [N] with N above 0, got shape {tuple(scores.shape)}: give one a sample")
    check_numbers(least=0, below=0.5, remedy="give the share to cut off at either end", clip=clip)
    scores = scores.detach().double().cpu()
    if not scores.isfinite().all():
        at = int((~scores.isfinite()).nonzero()[0])
        raise ValueError(f"scores must be finite, got {float(scores[at])} at position {at}: lower the learning rate")
    if clip:
        ends = torch.quantile(scores, torch.tensor([clip, 1 - clip], dtype=torch.float64))
        scores = scores.clamp(ends[0], ends[1])
    return min_max(scores, equal=1.0)


def split_scaled(
    unit: Tensor, max_iter: int = 10, tol: float = 1e-2, variance_floor: float = 5e-4
) -> tuple[Tensor, Mixture | None]:
    """``clean_probability`` of scaled scores ``[N]``, and the fitted mixture; ``None`` if all scores are equal."""
    if bool((unit == unit[0]).all()):
        rank_zero_warn("all samples have the same score: every label counts as clean")
        return torch.ones_like(unit), None
    mixture = fit_mixture(unit, 2, max_iter=max_iter, tol=tol, variance_floor=variance_floor)
    return mixture.posterior(unit)[:, 1], mixture


def clean_probability(
    scores: Tensor, max_iter: int = 10, tol: float = 1e-2, variance_floor: float = 5e-4, clip: float = 0.0
) -> Tensor:
    """The probability that each label is clean: the posterior of the higher of two Gaussians fitted to the scores.

    It is not always monotone in the score, because a wide lower Gaussian can win again at the upper end. If all scores
    are equal, every label counts as clean.

    Args:
        scores: ``[N]``, larger for cleaner labels: margins, or negative losses. They are scaled to [0, 1] first.
        max_iter: largest number of EM steps.
        tol: EM stops if the mean log-likelihood changes by less.
        variance_floor: added to each variance.
        clip: share of the scores that is clipped at either end before scaling; otherwise a single outlier can take up a
            Gaussian alone.

    Returns:
        float64 ``[N]`` in [0, 1], on the CPU.

    Raises:
        ValueError: if there is no score, one is not finite, or ``clip`` is not in [0, 0.5).

    Source: DPC, arXiv 2401.07062; the same mixture on losses in DivideMix, arXiv 2002.07394, section 3.1.
    """
    return split_scaled(unit_scores(scores, clip), max_iter, tol, variance_floor)[0]


class LabelScores(NamedTuple):
    """Scores of the training labels from a method; all tensors are on the CPU and sorted by index.

    Attributes:
        index: int64 ``[n]``, positions in the training array.
        given: int64 ``[n]``, the given labels.
        predicted: int64 ``[n]``, the predicted classes.
        margin: ``[n]``, logit of the given label minus the largest other logit.
        score: ``[n]`` in [0, 1], the method's score, larger for cleaner labels, scaled as the mixture needs it.
        clean_probability: float64 ``[n]``, the probability that the label is clean.
        mixture: the mixture fitted to ``score``; ``None`` if the method uses none.
        clean: int64 ``[n]``, the true labels; ``None`` if unknown.
        threshold: labels with a larger clean probability count as clean.
    """

    index: Tensor  # type: ignore[assignment]  # replaces tuple.index
    given: Tensor
    predicted: Tensor
    margin: Tensor
    score: Tensor
    clean_probability: Tensor
    mixture: Mixture | None = None
    clean: Tensor | None = None
    threshold: float = 0.5

    def metrics(self) -> dict[str, float]:
        """The metrics to log, by name; more if the true labels are known."""
        selected = self.clean_probability > self.threshold
        values = {"clean_fraction": float(selected.double().mean())}
        if self.mixture is not None:
            for k, name in enumerate(("low", "high")):
                values[f"mixture_mean_{name}"] = float(self.mixture.mean[k])
                values[f"mixture_weight_{name}"] = float(self.mixture.weight[k])
        if self.clean is not None:
            found = selection_metrics(self.clean_probability, selected, self.given, self.clean)
            values.update({f"clean_{name}": found[name] for name in ("precision", "recall", "auc")})
            values["pure_ratio"] = found["precision"]
            values.update(memorisation(self.predicted, self.given, self.clean))
        return values

    def order(self) -> list[int]:
        """Positions in these tensors, sorted: labels that are most probably wrong first."""
        order: list[int] = np.lexsort((self.margin.numpy(), self.clean_probability.numpy())).tolist()
        return order

    def write(self, path: Path, file_names: list[str] | None = None) -> None:
        """Write a CSV file, labels that are most probably wrong first.

        Args:
            path: the file to write.
            file_names: paths of all training images, for a column ``path``. Default: no such column.
        """
        extra = [] if file_names is None else ["path"]
        rows: list[list[Any]] = [["index", "given", "predicted", "clean_probability", "margin", *extra]]
        for i in self.order():
            index = int(self.index[i])
            row = [index, int(self.given[i]), int(self.predicted[i])]
            numbers = [f"{float(self.clean_probability[i]):.6g}", f"{float(self.margin[i]):.6g}"]
            rows.append([*row, *numbers, *([] if file_names is None else [file_names[index]])])
        write_text(path, csv_text(rows))
