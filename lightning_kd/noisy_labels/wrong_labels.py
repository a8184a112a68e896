"""Labels that are reported as wrong because their probability is low: metrics, and the file that lists them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_kd.core.notes import note
from lightning_kd.file_writing import write_text
from lightning_kd.metrics import selection_metrics
from lightning_kd.noisy_labels.bldr_losses import flag_wrong
from lightning_kd.noisy_labels.label_scores import LabelScores
from lightning_kd.spreadsheet import csv_text


def wrong_label_metrics(scores: LabelScores, threshold: float) -> dict[str, float]:
    """Precision, recall, F1 and AUC of the labels reported as wrong; empty if the true labels are unknown."""
    if scores.clean is None:
        return {}
    kept = ~flag_wrong(scores.clean_probability, threshold)
    return selection_metrics(scores.clean_probability, kept, scores.given, scores.clean, "wrong")


def write_wrong_labels(path: Path, scores: LabelScores, suggested: Tensor, threshold: float) -> None:
    """Write the labels below ``threshold`` to a CSV file, the least probable first, and print their number.

    Args:
        path: the file to write.
        scores: scores of all training labels.
        suggested: int64 ``[n]``, the suggested other label of each sample.
        threshold: see ``flag_wrong``.
    """
    probability = scores.clean_probability
    order = probability.argsort(stable=True)
    order = order[flag_wrong(probability[order], threshold)]
    rows: list[list[Any]] = [["index", "given", "probability", "suggested"]]
    for i in order.tolist():
        row = [int(scores.index[i]), int(scores.given[i]), f"{float(probability[i]):.6g}", int(suggested[i])]
        rows.append(row)
    write_text(path, csv_text(rows))
    found = ", ".join(f"{name} {value:.3f}" for name, value in wrong_label_metrics(scores, threshold).items())
    note(f"{len(order)} of {len(probability)} labels look wrong ({found or f'see {path.name}'})")


def lost_classes(weight: Tensor, given: Tensor, num_classes: int) -> list[int]:
    """The given classes whose samples have almost no weight, from weights ``[n]`` and given labels ``[n]``."""
    count = torch.bincount(given, minlength=num_classes)
    mean = torch.bincount(given, weight.double(), minlength=num_classes) / count.clamp(min=1)
    lost: list[int] = ((mean < 0.1) & (count > 0)).nonzero().flatten().tolist()
    return lost
