"""Figures of the loss along random directions around the weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from lightning_kd.callbacks.label_figures import _new_figure
from lightning_kd.metrics import LossSlice

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def slice_figure(slices: LossSlice | Mapping[str, LossSlice], title: str = "Loss around the weights") -> Figure:
    """Curves of slices along one direction, or contours of one slice along two directions.

    The axis of the loss is logarithmic if the largest loss is more than 20 times the smallest.

    Args:
        slices: a result of ``lightning_kd.metrics.loss_slice``, or several along one direction by their labels.
        title: title of the figure.

    Raises:
        ValueError: for no slice, or for several if one is along two directions.
    """
    named = {"": slices} if isinstance(slices, LossSlice) else dict(slices)
    flat = all(part.loss.ndim == 1 for part in named.values())
    if not named or (len(named) > 1 and not flat):
        raise ValueError(
            f"slices must be one slice, or several along one direction, got {len(named)}: make a figure for each"
        )
    losses = np.concatenate([part.loss.numpy().ravel() for part in named.values()])
    losses = losses[np.isfinite(losses)]
    low, high = (losses.min(), losses.max()) if len(losses) else (1.0, 1.0)
    logarithmic = bool(low > 0 and high > 20 * low)
    figure, axes = _new_figure()
    axes.set_title(title)
    if flat:
        for label, part in named.items():
            axes.plot(part.position.numpy(), part.loss.numpy(), label=label or None)
        axes.set(xlabel="position along the direction", ylabel="loss", yscale="log" if logarithmic else "linear")
        axes.grid(alpha=0.3)
        if any(named):
            figure.legend(loc="outside lower center", ncols=3, frameon=False)
        return figure
    (part,) = named.values()
    from matplotlib.colors import LogNorm

    position, loss = part.position.numpy(), np.ma.masked_invalid(part.loss.numpy().T)
    if high > low:
        levels = np.geomspace(low, high, 16) if logarithmic else np.linspace(low, high, 16)
        shown = axes.contourf(position, position, loss, levels=levels, norm=LogNorm() if logarithmic else None)
        axes.contour(position, position, loss, levels=levels, colors="white", linewidths=0.4)
        figure.colorbar(shown, ax=axes, label="loss", format="%.3g")
    axes.plot(0, 0, "+", color="red")
    axes.set(xlabel="first direction", ylabel="second direction", aspect="equal")
    return figure
