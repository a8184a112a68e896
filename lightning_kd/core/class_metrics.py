"""The accuracy of each class: the confusion matrix, its picture, and the sizes of the classes."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics import Metric

from lightning_kd.file_writing import write_text, written_whole
from lightning_kd.spreadsheet import csv_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["MOST_CLASSES", "ConfusionMetric", "class_sizes", "confusion_figure", "write_confusion"]

#: with more classes there is no confusion matrix
MOST_CLASSES = 1000
#: ``acc_macro`` is logged if the sizes of the classes differ by more than this factor
UNEQUAL = 3


class ConfusionMetric(Metric):
    """The confusion matrix over all batches and processes.

    With ``tells_macro`` it gives ``acc_macro``, the mean accuracy over the classes that occur; otherwise no number.

    Args:
        num_classes: ``C``.

    Attributes:
        counts: int64 ``[C, C]``, samples by class and predicted class.
        table: the counts of all processes, on the CPU; ``None`` before ``compute``.
        tells_macro: see above; False by default.
    """

    full_state_update = False
    counts: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.tells_macro = False
        self.table: Tensor | None = None
        self.add_state("counts", torch.zeros(num_classes, num_classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, scores: Tensor, target: Tensor) -> None:
        """Add a batch: logits or probabilities ``[B, C]`` and classes, int64 ``[B]``."""
        cell = target * self.num_classes + scores.argmax(1)
        self.counts = self.counts + torch.bincount(cell, minlength=self.num_classes**2).view_as(self.counts)

    def compute(self) -> dict[str, float]:
        self.table = self.counts.cpu()
        if not self.tells_macro:
            return {}
        accuracy = class_accuracy(self.table)
        return {"acc_macro": float(accuracy[~accuracy.isnan()].mean())}


def class_accuracy(table: Tensor) -> Tensor:
    """The accuracy of each class, float64 ``[C]``, from its confusion matrix; NaN for classes that do not occur."""
    return table.diagonal().double() / table.sum(1)


def class_sizes(data: Any, num_classes: int) -> Tensor | None:
    """The number of training samples of each class by the given labels, int64 ``[C]``; ``None`` if it is not known.

    Args:
        data: a data module, or anything else that a Trainer was given.
        num_classes: ``C``.
    """
    problem = getattr(data, "problem", None)
    if problem is None or not problem.one_class or not hasattr(data, "train_indices"):
        return None
    target = data.train_target[torch.as_tensor(data.train_indices)]
    return torch.bincount(target[target >= 0], minlength=num_classes)


def are_unequal(sizes: Tensor | None) -> bool:
    """Whether the largest class is more than 3 times the smallest."""
    return sizes is not None and int(sizes.max()) > UNEQUAL * int(sizes.min())


def write_confusion(folder: Path, table: Tensor, class_names: Sequence[str]) -> list[Path]:
    """Write ``confusion.csv`` and ``confusion.png``, and return the paths of the written files.

    The CSV has a row for each class: its name, the number of its samples, its accuracy, and how many of them were
    predicted as each class. A picture that cannot be drawn gives a warning.

    Args:
        folder: the run folder.
        table: int64 ``[C, C]``, see ``ConfusionMetric``.
        class_names: ``C`` names; with another number of names, the numbers of the classes are written.
    """
    names = list(class_names) if len(class_names) == len(table) else [str(k) for k in range(len(table))]
    accuracies = [None if value != value else value for value in class_accuracy(table).tolist()]
    rows = [
        [name, sum(counts), accuracy, *counts]
        for name, counts, accuracy in zip(names, table.tolist(), accuracies, strict=True)
    ]
    written = [folder / "confusion.csv"]
    write_text(written[0], csv_text([["class", "count", "accuracy", *names], *rows]))
    try:
        figure = confusion_figure(table, names)
        with written_whole(folder / "confusion.png") as part, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from font")  # the names are in the CSV
            figure.savefig(part, format="png", metadata={"Software": None})
        written.append(folder / "confusion.png")
    except Exception as error:  # a test must not fail because of a picture
        (folder / "confusion.png").unlink(missing_ok=True)  # that of an earlier test
        rank_zero_warn(f"no picture confusion.png ({type(error).__name__}: {error}); confusion.csv has the numbers")
    return written


def confusion_figure(table: Tensor, names: Sequence[str]) -> Figure:
    """A picture of the confusion matrix, each row as shares of its class, with counts for up to 15 classes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = len(table)
    side = min(12.0, 4 + 0.3 * count)
    figure = Figure(figsize=(side, side), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    share = (table.double() / table.sum(1, keepdim=True).clamp(min=1)).numpy()
    picture = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(picture, ax=axes, label="share of the class", shrink=0.7)
    axes.set(xlabel="predicted", ylabel="class", title=f"{int(table.sum())} samples")
    if count <= 40:
        shown = [name.replace("$", r"\$") if len(name) <= 20 else f"{name[:19]}…".replace("$", r"\$") for name in names]
        axes.set_xticks(range(count), shown, rotation=90)
        axes.set_yticks(range(count), shown)
    if count <= 15:
        for row, column in table.nonzero().tolist():
            colour = "white" if share[row, column] > 0.5 else "black"
            axes.text(column, row, str(int(table[row, column])), ha="center", va="center", color=colour, fontsize=8)
    return figure
