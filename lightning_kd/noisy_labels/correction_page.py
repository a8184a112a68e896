"""The page on which a person corrects the labels that are most probably wrong."""

from __future__ import annotations

from typing import Any

import torch

from lightning_kd.core.label_page import PageRow, label_page, pictures_of
from lightning_kd.noisy_labels.label_scores import LabelScores

__all__ = ["correction_page"]


def correction_page(scores: LabelScores, data: Any, count: int) -> str:
    """The text of the page; what is saved on it, ``corrections.csv``, is a file that ``LabelFile`` takes.

    ``LabelFile`` changes the data set's own labels. So the file also has the samples that were trained on with another
    label than that, as after earlier corrections.

    Args:
        scores: of all training labels.
        data: the data module that they are of.
        count: how many to show, the most doubtful first.

    Raises:
        ValueError: where the samples are no images.
    """
    order = scores.order()
    order, others = order[:count], order[count:]
    changed = torch.zeros_like(scores.given, dtype=torch.bool) if scores.clean is None else scores.given != scores.clean
    indices = scores.index[order].tolist()
    files = data.train_image if isinstance(data.train_image, list) else None
    names = data.class_names
    rows = []

    def cells(index: int) -> list[Any]:
        return [index] if files is None else [index, files[index]]

    for k, index, picture in zip(order, indices, pictures_of(data, indices), strict=True):
        given, predicted = names[int(scores.given[k])], names[int(scores.predicted[k])]
        facts = [("index", str(index)), ("given", given), ("predicted", predicted)]
        facts.append(("clean probability", f"{float(scores.clean_probability[k]):.3f}"))
        if files is not None:
            facts.insert(0, ("path", files[index]))
        rows.append(PageRow(cells(index), picture, facts, predicted, given, given if changed[k] else None))
    return label_page(
        "the most doubtful labels",
        rows,
        # not "label": names of classes may be whole numbers other than their own
        ["index", *([] if files is None else ["path"]), "class_name"],
        names,
        file_name="corrections.csv",
        command="lightning-kd fit --config RUN/config.yaml --run ANOTHER_FOLDER --data.noise LabelFile "
        "--data.noise.path corrections.csv",
        keep_open=False,
        more=[[*cells(int(scores.index[k])), names[int(scores.given[k])]] for k in sorted(others) if changed[k]],
    )
