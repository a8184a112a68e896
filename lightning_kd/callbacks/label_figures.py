"""Figures about label noise and calibration, made with matplotlib without its global state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lightning_kd.metrics import Reliability

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BLUE, _RED, _GREY, _DARK = "#4477AA", "#EE6677", "#BBBBBB", "#222222"


def label_score_figure(scores: Any, title: str = "Scores of the given labels", bins: int = 60) -> Figure:
    """The histogram of the scores of all training labels, and the mixture that separates clean from wrong labels.

    If the true labels are known, clean and wrong labels have different colours. Dotted lines mark the scores at which
    the probability of a clean label is 1/2.

    Args:
        scores: the result of a task's ``label_scores()``: ``score`` ``[N]`` (larger for cleaner), ``given`` int64
            ``[N]``, ``clean`` (int64 ``[N]`` or ``None``), ``mixture`` (over the scores, or ``None``),
            ``clean_probability`` ``[N]`` and ``threshold``.
        title: title of the figure.
        bins: number of bins of the histogram.
    """
    score = scores.score.detach().cpu().double()
    low, high = float(score.min()), float(score.max())
    if high == low:
        low, high = low - 0.5, high + 0.5
    figure, axes = _new_figure()
    width = (high - low) / bins
    if scores.clean is None:
        groups = [(score, _GREY, f"all labels ({len(score):,})")]
    else:
        right = scores.given == scores.clean
        groups = [
            (score[right], _BLUE, f"clean labels ({int(right.sum()):,})"),
            (score[~right], _RED, f"wrong labels ({int((~right).sum()):,})"),
        ]
    edges = torch.linspace(low, high, bins + 1, dtype=torch.float64)
    axes.hist(
        [part.numpy() for part, _, _ in groups],
        bins=edges.numpy(),
        weights=[torch.full_like(part, 1 / (len(score) * width)).numpy() for part, _, _ in groups],
        stacked=True,
        color=[color for _, color, _ in groups],
        label=[label for _, _, label in groups],
    )
    top = axes.get_ylim()[1]
    if scores.mixture is not None:
        grid = torch.linspace(low, high, 1001, dtype=torch.float64)
        joint = scores.mixture.log_joint(grid)
        for k, line in zip(range(joint.shape[1]), ("--", "-", "-."), strict=False):
            name = f"Gaussian {k + 1} (weight {float(scores.mixture.weight[k]):.2f})"
            axes.plot(grid.numpy(), joint[:, k].exp().numpy(), line, color=_DARK, linewidth=1.5, label=name)
        is_clean = joint.argmax(1) == joint.shape[1] - 1
        for k, place in enumerate(grid[1:][is_clean[1:] != is_clean[:-1]].tolist()):
            axes.axvline(place, color=_DARK, linestyle=":", linewidth=1, label="" if k else "clean probability 1/2")
        top = max(top, 1.05 * float(joint.exp().max()))
    share = float((scores.clean_probability > scores.threshold).double().mean())
    axes.set(xlim=(low, high), ylim=(0, top), xlabel="score of the given label (larger is cleaner)", ylabel="density")
    axes.set_title(f"{title}: {share:.1%} taken for clean")
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def reliability_figure(found: Reliability, title: str = "Reliability") -> Figure:
    """The reliability diagram: accuracy against confidence in each bin, and below it the share of samples in each bin.

    Args:
        found: the result of ``lightning_kd.metrics.reliability``.
        title: title of the figure.
    """
    figure, (axes, below) = _new_figure(rows=2, height_ratios=(4, 1), sharex=True)
    count = len(found.share)
    width = 1 / count
    filled = (found.share > 0).numpy()
    middle = ((torch.arange(count) + 0.5) * width).numpy()[filled]
    accuracy, confidence, share = (part.numpy()[filled] for part in (found.accuracy, found.confidence, found.share))
    shape = {"width": 0.94 * width}
    axes.bar(middle, accuracy, color=_BLUE, label="accuracy", **shape)
    gap = {"color": "none", "edgecolor": _RED, "hatch": "///", "linewidth": 1.2, "label": "gap to the mean confidence"}
    axes.bar(middle, confidence - accuracy, bottom=accuracy, **gap, **shape)
    axes.plot([0, 1], [0, 1], "--", color=_DARK, linewidth=1, label="perfectly calibrated")
    axes.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy")
    right = float((share * accuracy).sum())
    axes.set_title(f"{title}: ECE {found.ece:.3f}, accuracy {right:.1%}")
    below.bar(middle, share, color=_GREY, **shape)
    below.set(xlabel="confidence (largest probability)", ylabel="share", ylim=(0, None))
    for part in (axes, below):
        part.grid(alpha=0.3)
        part.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def _new_figure(rows: int = 1, **options: Any) -> tuple[Figure, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5 if rows == 1 else 6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, 1, **options)
