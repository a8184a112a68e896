"""The page on which a person corrects the labels that are most probably wrong."""

from __future__ import annotations

from typing import Any

from lightning_kd.core.label_page import PageRow, label_page, pictures_of
from lightning_kd.noisy_labels.label_scores import LabelScores

__all__ = ["correction_page"]


def correction_page(scores: LabelScores, data: Any, count: int) -> str:
    """The text of the page; what is saved on it, ``corrections.csv``, is a file that ``LabelFile`` takes.

    Args:
        scores: of all training labels.
        data: the data module that they are of.
        count: how many to show, the most doubtful first.

    Raises:
        ValueError: where the samples are no images.
    """
    order = scores.order()[:count]
    indices = scores.index[order].tolist()
    files = data.train_image if isinstance(data.train_image, list) else None
    names = data.class_names
    rows = []
    for k, index, picture in zip(order, indices, pictures_of(data, indices), strict=True):
        given, predicted = names[int(scores.given[k])], names[int(scores.predicted[k])]
        facts = [("index", str(index)), ("given", given), ("predicted", predicted)]
        facts.append(("clean probability", f"{float(scores.clean_probability[k]):.3g}"))
        if files is not None:
            facts.insert(0, ("path", files[index]))
        rows.append(PageRow([index, *([] if files is None else [files[index]])], picture, facts, predicted, given))
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
    )
