"""The HTML page on which a person corrects the labels that are most probably wrong."""

from __future__ import annotations

from typing import Any

from lightning_kd.core.label_page import PageRow, label_page, pictures_of
from lightning_kd.noisy_labels.label_scores import LabelScores

__all__ = ["correction_page"]


def correction_page(scores: LabelScores, data: Any, count: int) -> str:
    """The HTML text of the page; it saves ``corrections.csv``, which ``LabelFile`` can read.

    ``LabelFile`` changes the labels of the original data set. So the file also contains all samples whose current label
    differs from the original one, for example by earlier corrections. This includes validation samples, because another
    split may use them for training.

    Args:
        scores: scores of all training labels.
        data: the data module of these labels.
        count: number of labels on the page, those most probably wrong first.

    Raises:
        ValueError: if the samples are no images.
    """
    order = scores.order()[:count]
    indices = scores.index[order].tolist()
    clean = getattr(data, "train_clean", None)
    changed = {*(() if clean is None else (data.train_target != clean).nonzero().flatten().tolist())}
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
        rows.append(PageRow(cells(index), picture, facts, predicted, given, given if index in changed else None))
    return label_page(
        "the labels that are most probably wrong",
        rows,
        # the column is not "label", which holds class indices: a class name may be a number, but not its own index
        ["index", *([] if files is None else ["path"]), "class_name"],
        names,
        file_name="corrections.csv",
        command="lightning-kd fit --config RUN/config.yaml --run ANOTHER_FOLDER --data.noise LabelFile "
        "--data.noise.path corrections.csv",
        keep_open=False,
        more=[[*cells(index), names[int(data.train_target[index])]] for index in sorted(changed - {*indices})],
    )
